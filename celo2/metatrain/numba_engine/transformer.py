"""The text network in Numba: loss, gradient by hand, and the steps of one unroll. Arrays as in `kernels.py`.

`families.text_losses` is the same network in torch. Weights lie as the kernels hold them: q, k, v, o and down (in, out), up
(out, in), embedding and head (V, D), position (D, T).

Legend: B sequences, T positions, N = B · T tokens, D width, F = 4D hidden units, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from celo2.metatrain import families, tasks
from celo2.metatrain.numba_engine.kernels import exponential, scaled_weights, step_all
from celo2.metatrain.numba_engine.products import ONE, OPTIONS, ZERO, matmul
from celo2.metatrain.numba_engine.simd import LANES, add, fma, lane_max, lane_sum, larger, load, mul, smaller, splat, store, sub

# As int64, not int: Numba compiles every function again for each literal integer that it is called with.
B, T, D, V = np.int64(families.SEQUENCES), np.int64(tasks.CONTEXT), np.int64(families.WIDTH), np.int64(tasks.VOCABULARY)
N, F = B * T, 4 * D
EMBEDDING, POSITION, HEAD = np.int64(0), V * D, V * D + T * D  # offsets in packed weights and gradients
BLOCKS = HEAD + V * D
WQ, WK, WV, WO, UP, DOWN, BLOCK = np.int64(0), D * D, 2 * D * D, 3 * D * D, 4 * D * D, 4 * D * D + F * D, 4 * D * D + 2 * F * D
# Offsets in what a block's forward pass leaves for its backward pass: normalized inputs, queries, keys, values, attention
# (N, T), attended values, normalized inputs of the MLP, its units before the activation (N, F); 1 / RMS of both inputs (N,).
H1, Q, K, VALUE, P, A = np.int64(0), N * D, 2 * N * D, 3 * N * D, 4 * N * D, 4 * N * D + N * T
H2 = A + N * D
U = H2 + N * D
R1, R2, SAVED = U + N * F, U + N * F + N, U + N * F + 2 * N
NORM_EPS, SCORE_SCALE, SHARE = np.float32(families.NORM_EPS), np.float32(D**-0.5), np.float32(1 / N)
FAR = np.float32(1e30)


@njit(**OPTIONS)
def transpose(a, at, rows, cols, out):
    """out (cols, rows) = a (rows, cols) from `at` on, transposed."""
    for i in range(rows):
        for j in range(cols):
            out[j * rows + i] = a[at + i * cols + j]


@njit(**OPTIONS)
def add_(x, y, size):
    """x += y."""
    for i in range(0, size, LANES):
        store(x, i, add(load(x, i), load(y, i)))


@njit(**OPTIONS)
def norm(x, y, at, r, r_at):
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
def add_norm_gradient(dx, dy, y, at, r, r_at):
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
def causal_softmax(p, at, mask):
    """Attention from the scores p (T, T) from `at` on, in place; mask (T, T) is 1 where a position may look."""
    for i in range(T):
        top = splat(-FAR)
        for j in range(i * T, (i + 1) * T, LANES):
            outside = mul(sub(load(mask, j), splat(ONE)), splat(FAR))
            score = fma(load(p, at + j), splat(SCORE_SCALE), outside)
            store(p, at + j, score)
            top = larger(top, score)
        highest, total = splat(lane_max(top)), splat(ZERO)
        for j in range(i * T, (i + 1) * T, LANES):
            e = mul(exponential(smaller(sub(load(p, at + j), highest), splat(ZERO))), load(mask, j))
            store(p, at + j, e)
            total = add(total, e)
        share = splat(ONE / lane_sum(total))
        for j in range(i * T, (i + 1) * T, LANES):
            store(p, at + j, mul(load(p, at + j), share))


@njit(**OPTIONS)
def softmax_gradient(d, p, at):
    """d (T, T), the gradient in attention p from `at` on, becomes the one in the scores before their scale."""
    for i in range(T):
        total = splat(ZERO)
        for j in range(i * T, (i + 1) * T, LANES):
            total = fma(load(d, j), load(p, at + j), total)
        mean = splat(lane_sum(total))
        for j in range(i * T, (i + 1) * T, LANES):
            store(d, j, mul(mul(sub(load(d, j), mean), load(p, at + j)), splat(SCORE_SCALE)))


@njit(**OPTIONS)
def cross_entropy(d, targets):
    """Mean cross-entropy of logits d (N, V), which become its gradient."""
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
            store(d, j, mul(load(d, j), splat(SHARE / mass)))
        d[row + targets[n]] -= SHARE
    return np.float32(loss / N)


@njit(**OPTIONS)
def forward_block(w, at, x, saved, s, mask, turned, y):
    """x (N, D) += attention, then += MLP, with weights at `at`; leaves at `s` of `saved` what `backward_block` needs."""
    norm(x, saved, s + H1, saved, s + R1)
    matmul(saved, s + H1, D, 1, w, at + WQ, saved, s + Q, N, D, D)
    matmul(saved, s + H1, D, 1, w, at + WK, saved, s + K, N, D, D)
    matmul(saved, s + H1, D, 1, w, at + WV, saved, s + VALUE, N, D, D)
    for b in range(B):
        o, p = s + b * T * D, s + P + b * T * T
        transpose(saved, o + K, T, D, turned)
        matmul(saved, o + Q, D, 1, turned, 0, saved, p, T, D, T)
        causal_softmax(saved, p, mask)
        matmul(saved, p, T, 1, saved, o + VALUE, saved, o + A, T, T, D)
    matmul(saved, s + A, D, 1, w, at + WO, y, 0, N, D, D)
    add_(x, y, N * D)
    norm(x, saved, s + H2, saved, s + R2)
    transpose(w, at + UP, F, D, turned)
    matmul(saved, s + H2, D, 1, turned, 0, saved, s + U, N, D, F)
    for i in range(0, N * F, LANES):
        h = larger(load(saved, s + U + i), splat(ZERO))
        store(y, i, mul(h, h))
    z = y[N * F :]
    matmul(y, 0, F, 1, w, at + DOWN, z, 0, N, F, D)
    add_(x, z, N * D)


@njit(**OPTIONS)
def backward_block(w, at, dx, saved, s, turned, y, g):
    """dx (N, D), the gradient in a block's output, becomes the one in its input; that in its weights goes to g at `at`."""
    du, dq, dk, dv, dy, z = y[: N * F], y[: N * D], y[N * D :], y[2 * N * D :], y[N * F :], y[N * F + N * D :]
    transpose(w, at + DOWN, F, D, turned)
    matmul(dx, 0, D, 1, turned, 0, du, 0, N, D, F)
    for i in range(0, N * F, LANES):
        h = larger(load(saved, s + U + i), splat(ZERO))
        store(du, i, mul(load(du, i), add(h, h)))
        store(saved, s + U + i, mul(h, h))
    matmul(saved, s + U, 1, F, dx, 0, g, at + DOWN, F, N, D)
    matmul(du, 0, 1, F, saved, s + H2, g, at + UP, F, N, D)
    matmul(du, 0, F, 1, w, at + UP, dy, 0, N, F, D)
    add_norm_gradient(dx, dy, saved, s + H2, saved, s + R2)

    matmul(saved, s + A, 1, D, dx, 0, g, at + WO, D, N, D)
    transpose(w, at + WO, D, D, turned)
    matmul(dx, 0, D, 1, turned, 0, dy, 0, N, D, D)
    for b in range(B):
        n, o, p = b * T * D, s + b * T * D, s + P + b * T * T
        transpose(saved, o + VALUE, T, D, turned)
        matmul(dy, n, D, 1, turned, 0, z, 0, T, D, T)
        matmul(saved, p, 1, T, dy, n, dv, n, T, T, D)
        softmax_gradient(z, saved, p)
        matmul(z, 0, T, 1, saved, o + K, dq, n, T, T, D)
        matmul(z, 0, 1, T, saved, o + Q, dk, n, T, T, D)
    dy[: N * D] = ZERO
    for m, d in ((WQ, dq), (WK, dk), (WV, dv)):
        matmul(saved, s + H1, 1, D, d, 0, g, at + m, D, N, D)
        transpose(w, at + m, D, D, turned)
        matmul(d, 0, D, 1, turned, 0, z, 0, N, D, D)
        add_(dy, z, N * D)
    add_norm_gradient(dx, dy, saved, s + H1, saved, s + R1)


@njit(**OPTIONS)
def transformer_gradient(inputs, targets, layers, w, g, saved, mask, turned, y):
    """Mean cross-entropy of the network with packed weights w on tokens (N,) and their successors; its gradient into g.

    Scratch: saved (layers * SAVED + N * D + N), turned (V * D), y (N * (F + 2D)); mask as for `causal_softmax`.
    """
    x, last, logits = np.empty(N * D, np.float32), layers * SAVED, np.empty(N * V, np.float32)
    transpose(w, POSITION, D, T, turned)
    for n in range(N):
        for j in range(0, D, LANES):
            position = load(turned, n % T * D + j)
            store(x, n * D + j, add(load(w, EMBEDDING + inputs[n] * D + j), position))
    for layer in range(layers):
        forward_block(w, BLOCKS + layer * BLOCK, x, saved, layer * SAVED, mask, turned, y)
    norm(x, saved, last, saved, last + N * D)
    transpose(w, HEAD, V, D, turned)
    matmul(saved, last, D, 1, turned, 0, logits, 0, N, D, V)
    loss = cross_entropy(logits, targets)

    matmul(logits, 0, 1, V, saved, last, g, HEAD, V, N, D)
    matmul(logits, 0, V, 1, w, HEAD, y, 0, N, V, D)
    x[:] = ZERO  # from here on the gradient in what it was
    add_norm_gradient(x, y, saved, last, saved, last + N * D)
    for layer in range(layers - 1, -1, -1):
        backward_block(w, BLOCKS + layer * BLOCK, x, saved, layer * SAVED, turned, y, g)
    g[EMBEDDING:POSITION] = ZERO
    turned[: T * D] = ZERO
    for n in range(N):
        for j in range(0, D, LANES):
            d, e, p = load(x, n * D + j), EMBEDDING + inputs[n] * D + j, n % T * D + j
            store(g, e, add(load(g, e), d))
            store(turned, p, add(load(turned, p), d))
    transpose(turned, 0, T, D, g[POSITION:HEAD])
    return loss


def compiled(source: str):
    """As `mlp.compiled`."""

    @njit(cache=True, **OPTIONS)
    def unroll_one(
        arrays, rows, rate, reset_at, before, after, fresh, table, theta, state, losses, orthogonalized, normalized, lr, adam_lr
    ):
        """As in `mlp.compiled`; the examples are sequences by their first byte."""
        (tokens,) = arrays
        inputs, targets = np.empty(N, np.int64), np.empty(N, np.int64)
        g, w = np.empty_like(before), np.empty_like(before)
        layers = (len(before) - BLOCKS) // BLOCK
        saved = np.empty(layers * SAVED + N * D + N, np.float32)
        turned, y = np.empty(V * D, np.float32), np.empty(N * (F + 2 * D), np.float32)
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
            losses[t] = transformer_gradient(inputs, targets, layers, w, g, saved, mask, turned, y)
            step_all(table, theta, scale, state, g, turned, orthogonalized, normalized, rate[t] * lr, rate[t] * adam_lr)
        return source

    return unroll_one
