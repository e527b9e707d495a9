"""Products of small matrices in Numba, and Newton–Schulz made of them: step 8 of the rule.

Matrices are row-major in one-dimensional float32 arrays, from an offset on; their width is a multiple of 16.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from celo2 import orthogonalize
from celo2.metatrain.numba_engine.simd import LANES, broadcast, fma, lane_sum, load, mul, splat, store

OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
ZERO, ONE = np.float32(0), np.float32(1)
NS_A, NS_B, NS_C = (np.float32(x) for x in orthogonalize.COEFFICIENTS)
NS_STEPS, NS_EPS = orthogonalize.STEPS, np.float32(orthogonalize.EPS)


def padded(n: int) -> int:
    """`n` rounded up to whole vectors."""
    return -(-n // LANES) * LANES


@njit(**OPTIONS)
def matmul(a, a_at, a_row, a_col, b, b_at, c, c_at, m, k, n):
    """c (m, n) = A (m, k) @ b (k, n); A's element (i, j) is a[a_at + i * a_row + j * a_col]. m % 8 == 0, n % 16 == 0."""
    zero = splat(ZERO)
    for j in range(0, n // 32 * 32, 32):
        for i in range(0, m, 4):
            p0 = a_at + i * a_row
            p1, p2, p3 = p0 + a_row, p0 + 2 * a_row, p0 + 3 * a_row
            c00, c01, c10, c11, c20, c21, c30, c31 = zero, zero, zero, zero, zero, zero, zero, zero
            for t in range(k):
                b0, b1 = load(b, b_at + t * n + j), load(b, b_at + t * n + j + 16)
                x = broadcast(a, p0 + t * a_col)
                c00, c01 = fma(x, b0, c00), fma(x, b1, c01)
                x = broadcast(a, p1 + t * a_col)
                c10, c11 = fma(x, b0, c10), fma(x, b1, c11)
                x = broadcast(a, p2 + t * a_col)
                c20, c21 = fma(x, b0, c20), fma(x, b1, c21)
                x = broadcast(a, p3 + t * a_col)
                c30, c31 = fma(x, b0, c30), fma(x, b1, c31)
            q = c_at + i * n + j
            store(c, q, c00)
            store(c, q + 16, c01)
            store(c, q + n, c10)
            store(c, q + n + 16, c11)
            store(c, q + 2 * n, c20)
            store(c, q + 2 * n + 16, c21)
            store(c, q + 3 * n, c30)
            store(c, q + 3 * n + 16, c31)
    if n % 32:
        j = n - 16
        for i in range(0, m, 8):
            p = a_at + i * a_row
            h = (zero, zero, zero, zero, zero, zero, zero, zero)
            for t in range(k):
                h = accumulate(h, load(b, b_at + t * n + j), a, p + t * a_col, a_row)
            q = c_at + i * n + j
            store(c, q, h[0])
            store(c, q + n, h[1])
            store(c, q + 2 * n, h[2])
            store(c, q + 3 * n, h[3])
            store(c, q + 4 * n, h[4])
            store(c, q + 5 * n, h[5])
            store(c, q + 6 * n, h[6])
            store(c, q + 7 * n, h[7])


@njit(**OPTIONS)
def accumulate(h, x, weights, at, stride):
    """h[i] + x * weights[at + i * stride], for the eight vectors of h."""
    return (
        fma(x, broadcast(weights, at), h[0]),
        fma(x, broadcast(weights, at + stride), h[1]),
        fma(x, broadcast(weights, at + 2 * stride), h[2]),
        fma(x, broadcast(weights, at + 3 * stride), h[3]),
        fma(x, broadcast(weights, at + 4 * stride), h[4]),
        fma(x, broadcast(weights, at + 5 * stride), h[5]),
        fma(x, broadcast(weights, at + 6 * stride), h[6]),
        fma(x, broadcast(weights, at + 7 * stride), h[7]),
    )


@njit(**OPTIONS)
def sum_of_squares(x, size):
    """Sum of x[i]² over i < size, a multiple of 16."""
    total = splat(ZERO)
    for i in range(0, size, LANES):
        v = load(x, i)
        total = fma(v, v, total)
    return lane_sum(total)


@njit(**OPTIONS)
def scale_(x, size, factor):
    """x[:size] *= factor."""
    for i in range(0, size, LANES):
        store(x, i, mul(load(x, i), splat(factor)))


@njit(**OPTIONS)
def newton_schulz_(u, rows, width):
    """Orthogonalize u (rows, width) in place. The padding stays zero."""
    gram, scaled = np.empty(width * width, np.float32), np.empty(width * width, np.float32)
    polynomial = np.empty(width * width, np.float32)
    x, y = u, np.empty(rows * width, np.float32)
    scale_(x, rows * width, ONE / (np.sqrt(sum_of_squares(x, rows * width)) + NS_EPS))
    for _ in range(NS_STEPS):
        matmul(x, 0, 1, width, x, 0, gram, 0, width, rows, width)
        for i in range(0, width * width, LANES):
            store(scaled, i, mul(load(gram, i), splat(NS_C)))
        for i in range(width):
            scaled[i * width + i] += NS_B
        matmul(gram, 0, width, 1, scaled, 0, polynomial, 0, width, width, width)
        for i in range(width):
            polynomial[i * width + i] += NS_A
        matmul(x, 0, width, 1, polynomial, 0, y, 0, rows, width, width)
        x, y = y, x
    for i in range(0, rows * width, LANES):
        store(u, i, load(x, i))
