"""The truncated unroll in Numba, on CPU threads: the same numbers as `unroll.py` to within rounding, about ten times as fast.

Each unroll is one call that runs all T steps in caches of its own, so the result does not depend on the number of threads.
The state is packed for the kernels (see `kernels.py`) before the steps and unpacked after them.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numba import njit

from celo2 import orthogonalize
from celo2 import rule as rules
from celo2.metatrain import kernels, problems, products, simd, tasks
from celo2.metatrain.config import Config
from celo2.metatrain.kernels import exponential, lane_mask, step_adam, step_matrix, step_vector
from celo2.metatrain.problems import SHAPES, Truncation, Weights
from celo2.metatrain.products import ONE, OPTIONS, ZERO, matmul, padded
from celo2.metatrain.simd import LANES, add, lane_max, lane_sum, larger, load, mul, smaller, splat, store, sub, where_positive
from celo2.metatrain.tasks import Images
from celo2.metatrain.unroll import State, accumulator_shapes, by_adam

# As int64, not int: Numba compiles every function again for each literal integer that it is called with.
INPUTS, HIDDEN, CLASSES = np.int64(tasks.SIDE**2), np.int64(problems.HIDDEN), np.int64(tasks.CLASSES)
WIDTH = np.int64(padded(CLASSES))  # of the logits' rows
W1, B1 = np.int64(0), INPUTS * HIDDEN  # offsets of the weights in a packed gradient or scale
W2 = B1 + HIDDEN
B2 = W2 + HIDDEN * WIDTH
WEIGHTS = B2 + WIDTH
FAR = np.float32(1e30)


def segments(variant: str) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Where each state array of one unroll lies in the packed state: (offset, padded shape), in the kernels' order."""
    result, offset = {}, 0
    for name in SHAPES:
        for key, shape in {"weight": SHAPES[name], **accumulator_shapes(variant, name)}.items():
            # SHAPES has no matrix that is wider than high; `col` (K, rows) alone runs along the axis that is not padded.
            shape = shape if key == "col" else (*shape[:-1], padded(shape[-1]))
            result[f"{name}.{key}"] = (offset, shape)
            offset += int(np.prod(shape))
    return result


def pack(variant: str, state: State) -> np.ndarray:
    """The state as one row of float32 per unroll, padded with zeros."""
    layout = segments(variant)
    offset, shape = layout["b2." + ("v" if by_adam(variant, "b2") else "diag")]
    packed = np.zeros((len(state["w1.weight"]), offset + int(np.prod(shape))), np.float32)
    for key, view in views(layout, packed, state).items():
        view[...] = state[key]
    return packed


def views(layout: dict[str, tuple[int, tuple[int, ...]]], packed: np.ndarray, state: State) -> dict[str, np.ndarray]:
    """The packed rows as arrays of the state's shapes, without the padding."""
    result = {}
    for key, (offset, shape) in layout.items():
        view = packed[:, offset : offset + int(np.prod(shape))].reshape(-1, *shape)
        result[key] = view[..., : state[key].shape[-1]]
    return result


def pack_weights(weights: Weights) -> np.ndarray:
    """Scales of all problems (N, WEIGHTS) in the order of a packed gradient."""
    rows = []
    for x in weights.values():
        wide = np.zeros((*x.shape[:-1], padded(x.shape[-1])), np.float32)
        wide[..., : x.shape[-1]] = x
        rows.append(wide.reshape(len(x), -1))
    return np.concatenate(rows, 1)


def unroll(config: Config, data: Images, state: State, theta: np.ndarray, truncation: Truncation) -> np.ndarray:
    """As `celo2.metatrain.unroll.unroll`."""
    variant = config.variant
    packed = pack(variant, state)
    zeros = {key: np.zeros((len(truncation.rows), *x.shape[1:]), np.float32) for key, x in state.items()}
    fresh = pack(variant, zeros | {f"{name}.weight": w for name, w in truncation.fresh.items()})
    before, after = pack_weights(truncation.scale_before), pack_weights(truncation.scale_after)
    losses = np.empty((len(theta), config.truncation), np.float32)
    theta = np.ascontiguousarray(theta, np.float32)
    lr, adam_lr = np.float32(config.inner_lr), np.float32(config.inner_adam_lr)

    pixels = data.pixels.ravel()

    def run(u: int) -> None:
        n = u // 2
        unroll_one(
            pixels, data.labels, truncation.rows[n], truncation.reset_at[n], before[n], after[n], fresh[n],
            theta[u], packed[u], losses[u], variant == "celo2", lr, adam_lr,
        )  # fmt: skip

    with ThreadPoolExecutor(config.threads or os.cpu_count()) as pool:
        list(pool.map(run, range(len(theta))))
    for key, view in views(segments(variant), packed, state).items():
        state[key][...] = view
    return losses


@njit(**OPTIONS)
def multiply(a, a_at, b, b_at, c, c_at, size):
    """c = a * b on `size` elements from the three offsets."""
    for i in range(0, size, LANES):
        store(c, c_at + i, mul(load(a, a_at + i), load(b, b_at + i)))


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

    Numba sees that this file changed, but not the files it takes functions from; `source`, their hash, makes it look up
    another entry then, because what a function closes over is part of its key.
    """

    @njit(cache=True, **OPTIONS)
    def unroll_one(pixels, labels, rows, reset_at, before, after, fresh, theta, state, losses, celo2, lr, adam_lr):
        """All steps of one unroll: rows (T, B), scales (WEIGHTS,), fresh and state one packed row, losses (T,)."""
        steps, batch = rows.shape
        x, y = np.empty(batch * INPUTS, np.float32), np.empty(batch, np.int64)
        g, w = np.empty(WEIGHTS, np.float32), np.empty(WEIGHTS, np.float32)
        u = np.empty(INPUTS * HIDDEN, np.float32)
        g1, gb1, g2, gb2 = g[W1:B1], g[B1:W2], g[W2:B2], g[B2:]
        vector_parts = 3 if celo2 else 8  # arrays of a vector's segment: weight, m, v or weight, K momenta, v, K diag
        b1_at = 5 * INPUTS * HIDDEN + 3 * HIDDEN + 3 * INPUTS
        w2_at = b1_at + vector_parts * HIDDEN
        b2_at = w2_at + 5 * HIDDEN * WIDTH + 3 * WIDTH + 3 * HIDDEN
        scale = before
        for t in range(steps):
            if t == reset_at:
                scale = after
                state[:] = fresh
            for b in range(batch):
                y[b] = labels[rows[t, b]]
                for i in range(0, INPUTS, LANES):
                    store(x, b * INPUTS + i, load(pixels, rows[t, b] * INPUTS + i))
            multiply(scale, W1, state, W1, w, W1, INPUTS * HIDDEN)
            multiply(scale, B1, state, b1_at, w, B1, HIDDEN)
            multiply(scale, W2, state, w2_at, w, W2, HIDDEN * WIDTH)
            multiply(scale, B2, state, b2_at, w, B2, WIDTH)
            losses[t] = mlp_gradient(x, y, w, g)
            multiply(scale, W1, g, W1, g, W1, WEIGHTS)
            step_matrix(theta, state, W1, g1, u, INPUTS, HIDDEN, HIDDEN, celo2, lr)
            step_matrix(theta, state, w2_at, g2, u, HIDDEN, CLASSES, WIDTH, celo2, lr)
            if celo2:
                step_adam(state, b1_at, gb1, HIDDEN, adam_lr)
                step_adam(state, b2_at, gb2, WIDTH, adam_lr)
            else:
                step_vector(theta, state, b1_at, gb1, HIDDEN, HIDDEN, lr)
                step_vector(theta, state, b2_at, gb2, CLASSES, WIDTH, lr)
        return source

    return unroll_one


def source_hash() -> str:
    """sha256 of every file that the kernel is made of."""
    files = [Path(module.__file__) for module in (kernels, products, simd, rules, orthogonalize)] + [Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


unroll_one = compiled(source_hash())
