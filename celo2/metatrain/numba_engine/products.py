"""Products of small matrices in Numba, and with them Newton–Schulz: step 8 of the rule.

Matrices are row-major in one-dimensional float32 arrays, beginning at an offset; their width is a multiple of 16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from celo2 import orthogonalize
from celo2.metatrain.numba_engine.simd import (
    LANES,
    accumulate,
    accumulate_pair,
    add,
    fma,
    lane_sum,
    load,
    mul,
    splat,
    store,
    store_column,
    store_pairs,
    zeros,
)

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
ZERO, ONE = np.float32(0), np.float32(1)
NS_A, NS_B, NS_C = (np.float32(x) for x in orthogonalize.COEFFICIENTS)
NS_STEPS, NS_EPS = orthogonalize.STEPS, np.float32(orthogonalize.EPS)


def padded(n: int) -> int:
    """`n` rounded up to whole vectors."""
    return -(-n // LANES) * LANES


@njit(**OPTIONS)
def matmul(a, a_at, a_row, a_col, b, b_at, c, c_at, m, k, n):
    """c (m, n) = A (m, k) @ b (k, n); A's element (i, j) is a[a_at + i * a_row + j * a_col]. m % 8 == 0, k % 4 == 0, n % 16 == 0.

    Loops over k are unrolled by four: the compiler does not know k, and without this an unroll of a text takes 1.3 times as long.
    """
    matmul_of_columns(a, a_at, a_row, a_col, b, b_at, n, c, c_at, n, m, k, n)


@njit(**OPTIONS)
def matmul_of_columns(a, a_at, a_row, a_col, b, b_at, b_row, c, c_at, c_row, m, k, n):
    """As `matmul`, where b and c are columns of matrices whose rows have `b_row` and `c_row` elements."""
    for j in range(0, n // 32 * 32, 32):
        for i in range(0, m, 4):
            tile, p, q = zeros(), a_at + i * a_row, b_at + j
            for _ in range(0, k, 4):
                tile = accumulate_pair(tile, a, p, a_row, load(b, q), load(b, q + 16))
                p, q = p + a_col, q + b_row
                tile = accumulate_pair(tile, a, p, a_row, load(b, q), load(b, q + 16))
                p, q = p + a_col, q + b_row
                tile = accumulate_pair(tile, a, p, a_row, load(b, q), load(b, q + 16))
                p, q = p + a_col, q + b_row
                tile = accumulate_pair(tile, a, p, a_row, load(b, q), load(b, q + 16))
                p, q = p + a_col, q + b_row
            store_pairs(c, c_at + i * c_row + j, c_row, tile)
    if n % 32:
        j = n - 16
        for i in range(0, m, 8):
            tile, p, q = zeros(), a_at + i * a_row, b_at + j
            for _ in range(0, k, 4):
                tile = accumulate(tile, a, p, a_row, load(b, q))
                p, q = p + a_col, q + b_row
                tile = accumulate(tile, a, p, a_row, load(b, q))
                p, q = p + a_col, q + b_row
                tile = accumulate(tile, a, p, a_row, load(b, q))
                p, q = p + a_col, q + b_row
                tile = accumulate(tile, a, p, a_row, load(b, q))
                p, q = p + a_col, q + b_row
            store_column(c, c_at + i * c_row + j, c_row, tile)


@njit(**OPTIONS)
def add_(x, y, size):
    """x += y."""
    for i in range(0, size, LANES):
        store(x, i, add(load(x, i), load(y, i)))


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
