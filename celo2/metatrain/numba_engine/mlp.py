"""The image network 64-32-10 in Numba: loss, gradient by hand, and the steps of one unroll. Arrays as in `kernels.py`."""

from __future__ import annotations

import numpy as np
from numba import njit

from celo2.metatrain import families, tasks
from celo2.metatrain.numba_engine.kernels import exponential, lane_mask, scaled_weights, step_all
from celo2.metatrain.numba_engine.products import ONE, OPTIONS, ZERO, matmul, padded
from celo2.metatrain.numba_engine.simd import (
    LANES,
    add,
    lane_max,
    lane_sum,
    larger,
    load,
    mul,
    smaller,
    splat,
    store,
    sub,
    where_positive,
)

# As int64, not int: Numba compiles every function again for each literal integer that it is called with.
INPUTS, HIDDEN, CLASSES = np.int64(tasks.SIDE**2), np.int64(families.HIDDEN), np.int64(tasks.CLASSES)
WIDTH = np.int64(padded(tasks.CLASSES))  # of the logits' rows
W1, B1 = np.int64(0), INPUTS * HIDDEN  # offsets of the weights in a packed gradient or scale
W2 = B1 + HIDDEN
B2 = W2 + HIDDEN * WIDTH
FAR = np.float32(1e30)


@njit(**OPTIONS)
def mlp_gradient(x, y, w, g):
    """Mean cross-entropy of the network 64-32-10 with packed weights w on x (B, 64), y (B,); its gradient into g."""
    batch = len(y)
    h, dh = np.empty(batch * HIDDEN, np.float32), np.empty(batch * HIDDEN, np.float32)
    d = np.empty(batch * WIDTH, np.float32)  # logits, then their gradient
    w1, w2 = w[W1:B1], w[W2:B2]
    matmul(x, 0, INPUTS, 1, w1, 0, h, 0, batch, INPUTS, HIDDEN)
    for b in range(batch):
        for j in range(0, HIDDEN, LANES):
            p = b * HIDDEN + j
            store(h, p, larger(add(load(h, p), load(w, B1 + j)), splat(ZERO)))
    matmul(h, 0, HIDDEN, 1, w2, 0, d, 0, batch, HIDDEN, WIDTH)
    loss = softmax_cross_entropy(d, y, w)
    g[B1:W2] = ZERO
    g[B2:] = ZERO
    transposed = np.zeros(WIDTH * HIDDEN, np.float32)  # w2ᵀ
    for i in range(HIDDEN):
        for j in range(CLASSES):
            transposed[j * HIDDEN + i] = w2[i * WIDTH + j]
    matmul(d, 0, WIDTH, 1, transposed, 0, dh, 0, batch, WIDTH, HIDDEN)
    for b in range(batch):
        store(g, B2, add(load(g, B2), load(d, b * WIDTH)))
        for j in range(0, HIDDEN, LANES):
            p = b * HIDDEN + j
            store(dh, p, where_positive(load(h, p), load(dh, p)))
            store(g, B1 + j, add(load(g, B1 + j), load(dh, p)))
    matmul(x, 0, 1, INPUTS, dh, 0, g[W1:B1], 0, INPUTS, batch, HIDDEN)
    matmul(h, 0, 1, HIDDEN, d, 0, g[W2:B2], 0, HIDDEN, batch, WIDTH)
    return loss


@njit(**OPTIONS)
def softmax_cross_entropy(d, y, w):
    """Mean cross-entropy of logits d (B, WIDTH = 16) + b2; d becomes its gradient, zero in the padding."""
    batch = len(y)
    loss, share = ZERO, ONE / np.float32(batch)
    mask = np.empty(WIDTH, np.float32)
    lane_mask(mask, WIDTH, CLASSES)
    real = load(mask, 0)
    outside = mul(sub(real, splat(ONE)), splat(FAR))  # 0 on classes, very negative on the padding
    for b in range(batch):
        logits = add(load(d, b * WIDTH), load(w, B2))
        target = d[b * WIDTH + y[b]] + w[B2 + y[b]]
        top = lane_max(add(logits, outside))
        e = mul(exponential(smaller(sub(logits, splat(top)), splat(ZERO))), real)
        total = lane_sum(e)
        loss += np.log(total) + top - target
        store(d, b * WIDTH, mul(e, splat(share / total)))
        d[b * WIDTH + y[b]] -= share
    return loss * share


def compiled(source: str):
    """The kernel of one unroll, kept on disk for the next process.

    Numba notices changes of this file, but not of the files from which it takes functions. `source` is their hash. A function's
    closure is part of its cache key, so that another `source` makes Numba look up another entry.
    """

    @njit(cache=True, **OPTIONS)
    def unroll_one(arrays, sizes, rows, rate, reset_at, before, after, fresh, table, state, losses, terms, update):
        """All steps of one unroll: rows (T, B), rate (T,), packed scales, fresh and state one packed row, losses (T,).

        sizes: of the network; this one has only one size. table, update: see `kernels.step_all`. terms: (T, 2).
        """
        pixels, labels = arrays
        steps, batch = rows.shape
        x, y = np.empty(batch * INPUTS, np.float32), np.empty(batch, np.int64)
        g, w, u = np.empty_like(before), np.empty_like(before), np.empty_like(before)
        scale = before
        for t in range(steps):
            if t == reset_at:
                scale = after
                state[:] = fresh
            for b in range(batch):
                y[b] = labels[rows[t, b]]
                for i in range(0, INPUTS, LANES):
                    store(x, b * INPUTS + i, load(pixels, rows[t, b] * INPUTS + i))
            scaled_weights(table, scale, state, w)
            losses[t] = mlp_gradient(x, y, w, g)
            step_all(table, scale, state, g, u, rate[t], update, terms[t])
        return source

    return unroll_one
