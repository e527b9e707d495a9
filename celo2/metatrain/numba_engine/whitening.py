"""Whitening in Numba: the mathematics of `celo2.whitening` on one direction, held as in `kernels.py`.

Legend: u (rows, width) is a direction with its longer axis as rows, a multiple of 16, and zeros in its padding. P of its rows is
(rows, rows), that of its columns (width, width); the state holds P - 1, zero in the padding.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from celo2 import whitening
from celo2.metatrain.numba_engine.products import ONE, OPTIONS, ZERO, add_, matmul, scale_, sum_of_squares
from celo2.metatrain.numba_engine.simd import LANES, fma, load, splat, store

LEAK, TINY = np.float32(whitening.LEAK), np.float32(whitening.TINY)
HALF, TWO = np.float32(0.5), np.float32(2)


@njit(**OPTIONS)
def whiten_(u, state, at, rows, cols, width, rate):
    """u becomes P u P, divided by its RMS; then both whiteners move. That of rows is at `at` in `state`, the other follows."""
    size, of_cols = rows * width, at + rows * rows
    y, gram = np.empty(size, np.float32), np.empty(width * width, np.float32)
    matmul(state, at, rows, 1, u, 0, y, 0, rows, rows, width)
    add_(u, y, size)
    matmul(u, 0, width, 1, state, of_cols, y, 0, rows, width, width)
    add_(u, y, size)
    scale_(u, size, ONE / np.sqrt(sum_of_squares(u, size) / np.float32(rows * cols) + TINY))
    matmul(u, 0, 1, width, u, 0, gram, 0, width, rows, width)
    norm = np.sqrt(sum_of_squares(gram, width * width))  # of u uᵀ, too
    move_rows(u, y, state, at, rows, width, norm, np.float32(cols), rate)
    move_columns(gram, state, of_cols, cols, width, norm, np.float32(rows), rate)


@njit(**OPTIONS)
def move_columns(gram, state, at, n, width, norm, count, rate):
    """Move the whitener of n columns to A P A with A = 1 - ρ (gram / count - 1), for the gram uᵀ u over `count` rows.

    The gram is overwritten.
    """
    a, size, strength = gram, width * width, rate / (TWO + rate * (norm / count))
    pa, p = np.empty(size, np.float32), np.empty(size, np.float32)
    scale_(a, size, -strength / count)
    for i in range(width):
        a[i * width + i] += ONE + strength
    matmul(state, at, width, 1, a, 0, pa, 0, width, width, width)
    add_(pa, a, size)
    matmul(a, 0, width, 1, pa, 0, p, 0, width, width, width)
    settle(p, state, at, n, width, rate)


@njit(**OPTIONS)
def move_rows(u, y, state, at, rows, width, norm, count, rate):
    """Move the whitener of the rows, with u uᵀ over `count` columns. `y` is scratch memory of u's size.

    u uᵀ has a low rank, and A = a - b u uᵀ, so that A P A is a² P + u wᵀ + w uᵀ with w = b² / 2 u (uᵀ P u) - a b P u: a quarter
    of the products where a matrix is four times as long as wide.
    """
    strength = rate / (TWO + rate * (norm / count))
    size, a, b = rows * width, ONE + strength, strength / count
    inner, p = np.empty(width * width, np.float32), np.empty(rows * rows, np.float32)
    z, w = np.empty(size, np.float32), np.empty(size, np.float32)
    matmul(state, at, rows, 1, u, 0, y, 0, rows, rows, width)
    add_(y, u, size)  # P u
    matmul(u, 0, 1, width, y, 0, inner, 0, width, rows, width)
    matmul(u, 0, width, 1, inner, 0, z, 0, rows, width, width)
    of_z, of_y = b * b, TWO * a * b
    for first in range(0, rows, LANES):
        for j in range(width):
            for i in range(first, first + LANES):
                w[j * rows + i] = of_z * z[i * width + j] - of_y * y[i * width + j]  # 2 wᵀ
    matmul(u, 0, width, 1, w, 0, p, 0, rows, width, rows)
    for i in range(0, rows * rows, LANES):
        store(p, i, fma(splat(a * a), load(state, at + i), load(p, i)))
    for i in range(rows):
        p[i * rows + i] += a * a
    settle(p, state, at, rows, rows, rate)


@njit(**OPTIONS)
def settle(p, state, at, n, width, rate):
    """Write P - 1 into the state from p (width, width), of which n rows and columns count: symmetric, mean diagonal 1, decayed.

    It works in blocks, since the first-level cache holds few of the columns of a large p.
    """
    trace = ZERO
    for i in range(n):
        trace += p[i * width + i]
    keep = ONE - LEAK * rate
    factor = keep * HALF / (trace / np.float32(n))
    for low in range(0, n, LANES):
        for left in range(0, low + 1, LANES):
            for i in range(low, min(low + LANES, n)):
                for j in range(left, min(left + LANES, i)):
                    x = factor * (p[i * width + j] + p[j * width + i])
                    state[at + i * width + j] = x
                    state[at + j * width + i] = x
    for i in range(n):
        state[at + i * width + i] = TWO * factor * p[i * width + i] - keep
