"""The text network in Numba: loss, gradient by hand, and the steps of one unroll. Arrays as in `kernels.py`.

`families.text_losses` is the same network in torch. Weights lie as the kernels hold them: q, k, v, o and down (in, out), up
(out, in), embedding and head (V, D), position (D, T), or (T, D) where T > D.

Legend: B sequences, T positions, N = B · T tokens, D width, A attention heads, F = 4D hidden units, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from celo2.metatrain import families, tasks
from celo2.metatrain.numba_engine.kernels import exponential, scaled_weights, step_all
from celo2.metatrain.numba_engine.products import ONE, OPTIONS, ZERO, add_, matmul, matmul_of_columns
from celo2.metatrain.numba_engine.simd import LANES, add, fma, lane_max, lane_sum, larger, load, mul, smaller, splat, store, sub

V = np.int64(tasks.VOCABULARY)  # as int64, not int: Numba compiles every function again for each literal integer
NORM_EPS, FAR = np.float32(families.NORM_EPS), np.float32(1e30)


class Sizes(NamedTuple):
    """The sizes of a network and its batch (legend above), and where its arrays begin; one compilation serves all of them."""

    B: int
    T: int
    D: int
    A: int
    N: int
    F: int
    # Weights in a packed gradient; those of a block from its beginning on.
    position: int
    head: int
    blocks: int
    k: int
    v: int
    o: int
    up: int
    down: int
    block: int
    # What a block's forward pass leaves for its backward pass: normalized inputs (at 0), queries, keys, values, attention
    # (B, A, T, T), attended values, normalized inputs of the MLP, its units before the activation, 1 / RMS of both inputs.
    queries: int
    keys: int
    values: int
    attention: int
    attended: int
    mlp: int
    units: int
    r1: int
    r2: int
    saved: int


def sizes_of(B: int, T: int, D: int, A: int) -> Sizes:
    """The sizes of a network with A heads and the width D on B sequences of T bytes."""
    N, F, head, up = B * T, 4 * D, V * D + T * D, 4 * D * D
    attended = 4 * N * D + N * A * T
    r1 = attended + 2 * N * D + N * F
    of_weights = (V * D, head, head + V * D, D * D, 2 * D * D, 3 * D * D, up, up + F * D, up + 2 * F * D)
    of_saved = (N * D, 2 * N * D, 3 * N * D, 4 * N * D, attended, attended + N * D, attended + 2 * N * D, r1, r1 + N, r1 + 2 * N)
    return Sizes(*(int(n) for n in (B, T, D, A, N, F, *of_weights, *of_saved)))


@njit(**OPTIONS)
def transpose(a, at, rows, cols, out):
    """out (cols, rows) = a (rows, cols) from `at` on, transposed."""
    for i in range(rows):
        for j in range(cols):
            out[j * rows + i] = a[at + i * cols + j]


@njit(**OPTIONS)
def norm(x, y, at, r, r_at, N, D):
    """Rows of x (N, D) divided by their RMS, into y from `at` on; 1 / RMS into r from `r_at` on."""
    for n in range(N):
        total = splat(ZERO)
        for j in range(n * D, (n + 1) * D, LANES):
            total = fma(load(x, j), load(x, j), total)
        inverse = ONE / np.sqrt(lane_sum(total) / np.float32(D) + NORM_EPS)
        r[r_at + n] = inverse
        for j in range(n * D, (n + 1) * D, LANES):
            store(y, at + j, mul(load(x, j), splat(inverse)))


@njit(**OPTIONS)
def add_norm_gradient(dx, dy, y, at, r, r_at, N, D):
    """dx += the gradient of `norm` in its input, from dy (N, D) and its output y and r."""
    for n in range(N):
        total = splat(ZERO)
        for j in range(n * D, (n + 1) * D, LANES):
            total = fma(load(dy, j), load(y, at + j), total)
        inverse = splat(r[r_at + n])
        mean = splat(-lane_sum(total) / np.float32(D))
        for j in range(n * D, (n + 1) * D, LANES):
            store(dx, j, fma(inverse, fma(mean, load(y, at + j), load(dy, j)), load(dx, j)))


@njit(**OPTIONS)
def causal_softmax(p, at, mask, T, share):
    """Attention from share · scores p (T, T) from `at` on, in place; mask (T, T) is 1 where a position may look."""
    for i in range(T):
        top = splat(-FAR)
        for j in range(i * T, (i + 1) * T, LANES):
            outside = mul(sub(load(mask, j), splat(ONE)), splat(FAR))
            score = fma(load(p, at + j), splat(share), outside)
            store(p, at + j, score)
            top = larger(top, score)
        highest, total = splat(lane_max(top)), splat(ZERO)
        for j in range(i * T, (i + 1) * T, LANES):
            e = mul(exponential(smaller(sub(load(p, at + j), highest), splat(ZERO))), load(mask, j))
            store(p, at + j, e)
            total = add(total, e)
        inverse = splat(ONE / lane_sum(total))
        for j in range(i * T, (i + 1) * T, LANES):
            store(p, at + j, mul(load(p, at + j), inverse))


@njit(**OPTIONS)
def softmax_gradient(d, p, at, T, share):
    """d (T, T), the gradient in attention p from `at` on, becomes the one in the scores before their scale."""
    for i in range(T):
        total = splat(ZERO)
        for j in range(i * T, (i + 1) * T, LANES):
            total = fma(load(d, j), load(p, at + j), total)
        mean = splat(lane_sum(total))
        for j in range(i * T, (i + 1) * T, LANES):
            store(d, j, mul(mul(sub(load(d, j), mean), load(p, at + j)), splat(share)))


@njit(**OPTIONS)
def cross_entropy(d, targets, N, share):
    """Mean cross-entropy of logits d (N, V), which become its gradient; share = 1 / N."""
    loss = 0.0
    for n in range(N):
        row = n * V
        top = load(d, row)
        for j in range(row + LANES, row + V, LANES):
            top = larger(top, load(d, j))
        highest, total = lane_max(top), splat(ZERO)
        target = d[row + targets[n]]
        for j in range(row, row + V, LANES):
            e = exponential(smaller(sub(load(d, j), splat(highest)), splat(ZERO)))
            store(d, j, e)
            total = add(total, e)
        mass = lane_sum(total)
        loss += np.log(mass) + highest - target
        for j in range(row, row + V, LANES):
            store(d, j, mul(load(d, j), splat(share / mass)))
        d[row + targets[n]] -= share
    return np.float32(loss / N)


@njit(**OPTIONS)
def forward_block(w, at, x, saved, s, mask, turned, y, sizes):
    """x (N, D) += attention, then += MLP, with weights at `at`; leaves at `s` of `saved` what `backward_block` needs."""
    T, D, A, N, F = sizes.T, sizes.D, sizes.A, sizes.N, sizes.F
    width = D // A  # of a head
    norm(x, saved, s, saved, s + sizes.r1, N, D)
    matmul(saved, s, D, 1, w, at, saved, s + sizes.queries, N, D, D)
    matmul(saved, s, D, 1, w, at + sizes.k, saved, s + sizes.keys, N, D, D)
    matmul(saved, s, D, 1, w, at + sizes.v, saved, s + sizes.values, N, D, D)
    for b in range(sizes.B):
        transpose(saved, s + sizes.keys + b * T * D, T, D, turned)
        for a in range(A):
            o, p = s + b * T * D + a * width, s + sizes.attention + (b * A + a) * T * T
            matmul(saved, o + sizes.queries, D, 1, turned, a * width * T, saved, p, T, width, T)
            causal_softmax(saved, p, mask, T, score_share(width))
            matmul_of_columns(saved, p, T, 1, saved, o + sizes.values, D, saved, o + sizes.attended, D, T, T, width)
    matmul(saved, s + sizes.attended, D, 1, w, at + sizes.o, y, 0, N, D, D)
    add_(x, y, N * D)
    norm(x, saved, s + sizes.mlp, saved, s + sizes.r2, N, D)
    transpose(w, at + sizes.up, F, D, turned)
    matmul(saved, s + sizes.mlp, D, 1, turned, 0, saved, s + sizes.units, N, D, F)
    for i in range(0, N * F, LANES):
        h = larger(load(saved, s + sizes.units + i), splat(ZERO))
        store(y, i, mul(h, h))
    z = y[N * F :]
    matmul(y, 0, F, 1, w, at + sizes.down, z, 0, N, F, D)
    add_(x, z, N * D)


@njit(**OPTIONS)
def score_share(width):
    """The factor on scores of queries and keys with `width` numbers."""
    return np.float32(1 / np.sqrt(np.float64(width)))


@njit(**OPTIONS)
def backward_block(w, at, dx, saved, s, turned, y, g, sizes):
    """dx (N, D), the gradient in a block's output, becomes the one in its input; that in its weights goes to g at `at`."""
    T, D, A, N, F = sizes.T, sizes.D, sizes.A, sizes.N, sizes.F
    width = D // A
    du, dq, dk, dv, dy, z = y[: N * F], y[: N * D], y[N * D :], y[2 * N * D :], y[N * F :], y[N * F + N * D :]
    transpose(w, at + sizes.down, F, D, turned)
    matmul(dx, 0, D, 1, turned, 0, du, 0, N, D, F)
    for i in range(0, N * F, LANES):
        h = larger(load(saved, s + sizes.units + i), splat(ZERO))
        store(du, i, mul(load(du, i), add(h, h)))
        store(saved, s + sizes.units + i, mul(h, h))
    matmul(saved, s + sizes.units, 1, F, dx, 0, g, at + sizes.down, F, N, D)
    matmul(du, 0, 1, F, saved, s + sizes.mlp, g, at + sizes.up, F, N, D)
    matmul(du, 0, F, 1, w, at + sizes.up, dy, 0, N, F, D)
    add_norm_gradient(dx, dy, saved, s + sizes.mlp, saved, s + sizes.r2, N, D)

    matmul(saved, s + sizes.attended, 1, D, dx, 0, g, at + sizes.o, D, N, D)
    transpose(w, at + sizes.o, D, D, turned)
    matmul(dx, 0, D, 1, turned, 0, dy, 0, N, D, D)
    for b in range(sizes.B):
        transpose(saved, s + sizes.values + b * T * D, T, D, turned)
        for a in range(A):
            n = b * T * D + a * width
            o, p = s + n, s + sizes.attention + (b * A + a) * T * T
            matmul(dy, n, D, 1, turned, a * width * T, z, 0, T, width, T)
            matmul_of_columns(saved, p, 1, T, dy, n, D, dv, n, D, T, T, width)
            softmax_gradient(z, saved, p, T, score_share(width))
            matmul_of_columns(z, 0, T, 1, saved, o + sizes.keys, D, dq, n, D, T, T, width)
            matmul_of_columns(z, 0, 1, T, saved, o + sizes.queries, D, dk, n, D, T, T, width)
    dy[: N * D] = ZERO
    for m, d in ((0, dq), (sizes.k, dk), (sizes.v, dv)):
        matmul(saved, s, 1, D, d, 0, g, at + m, D, N, D)
        transpose(w, at + m, D, D, turned)
        matmul(d, 0, D, 1, turned, 0, z, 0, N, D, D)
        add_(dy, z, N * D)
    add_norm_gradient(dx, dy, saved, s, saved, s + sizes.r1, N, D)


@njit(**OPTIONS)
def transformer_gradient(inputs, targets, layers, w, g, saved, mask, turned, y, sizes):
    """Mean cross-entropy of the network with packed weights w on tokens (N,) and their successors; its gradient into g.

    Scratch as `compiled` makes it; mask as for `causal_softmax`.
    """
    T, D, N, position, head = sizes.T, sizes.D, sizes.N, sizes.position, sizes.head
    x, last, logits = np.empty(N * D, np.float32), layers * sizes.saved, np.empty(N * V, np.float32)
    if T > D:
        turned[: T * D] = w[position:head]
    else:
        transpose(w, position, D, T, turned)
    for n in range(N):
        for j in range(0, D, LANES):
            store(x, n * D + j, add(load(w, inputs[n] * D + j), load(turned, n % T * D + j)))
    for layer in range(layers):
        forward_block(w, sizes.blocks + layer * sizes.block, x, saved, layer * sizes.saved, mask, turned, y, sizes)
    norm(x, saved, last, saved, last + N * D, N, D)
    transpose(w, head, V, D, turned)
    matmul(saved, last, D, 1, turned, 0, logits, 0, N, D, V)
    loss = cross_entropy(logits, targets, N, np.float32(1 / N))

    matmul(logits, 0, 1, V, saved, last, g, head, V, N, D)
    matmul(logits, 0, V, 1, w, head, y, 0, N, V, D)
    x[:] = ZERO  # from here on the gradient in what it was
    add_norm_gradient(x, y, saved, last, saved, last + N * D, N, D)
    for layer in range(layers - 1, -1, -1):
        backward_block(w, sizes.blocks + layer * sizes.block, x, saved, layer * sizes.saved, turned, y, g, sizes)
    g[:position] = ZERO
    turned[: T * D] = ZERO
    for n in range(N):
        for j in range(0, D, LANES):
            d, e, p = load(x, n * D + j), inputs[n] * D + j, n % T * D + j
            store(g, e, add(load(g, e), d))
            store(turned, p, add(load(turned, p), d))
    if T > D:
        g[position:head] = turned[: T * D]
    else:
        transpose(turned, 0, T, D, g[position:head])
    return loss


def compiled(source: str):
    """As `mlp.compiled`."""

    @njit(cache=True, **OPTIONS)
    def unroll_one(arrays, sizes, rows, rate, reset_at, before, after, fresh, table, state, losses, terms, update):
        """As in `mlp.compiled`; the examples are sequences by their first byte."""
        (tokens,) = arrays
        T, D, N, F = sizes.T, sizes.D, sizes.N, sizes.F
        inputs, targets = np.empty(N, np.int64), np.empty(N, np.int64)
        g, w = np.empty_like(before), np.empty_like(before)
        layers = (len(before) - sizes.blocks) // sizes.block
        saved = np.empty(layers * sizes.saved + N * D + N, np.float32)
        turned, y = np.empty(max(V, F, T) * D, np.float32), np.empty(N * (F + D) + max(N * D, T * T), np.float32)
        mask = np.zeros(T * T, np.float32)
        for i in range(T):
            mask[i * T : i * T + i + 1] = ONE
        scale = before
        for t in range(len(rows)):
            if t == reset_at:
                scale = after
                state[:] = fresh
            for n in range(N):
                at = rows[t, n // T] + n % T
                inputs[n], targets[n] = tokens[at], tokens[at + 1]
            scaled_weights(table, scale, state, w)
            losses[t] = transformer_gradient(inputs, targets, layers, w, g, saved, mask, turned, y, sizes)
            step_all(table, scale, state, g, turned, rate[t], update, terms[t])
        return source

    return unroll_one
