"""Newton–Schulz with half of each symmetric product computed.

Of the three products of an iteration, X Xᵀ and A A are symmetric. `symmetric_kernel` computes the tiles of the diagonal blocks
and those below, and writes the latter transposed as well; every number is written once. For a square matrix an iteration
falls from 6 S³ FLOPs to 4 S³; for R : C = 1 : 4 from 18 S³ to 13 S³. The third product, a X + P X, is not symmetric and stays
`torch.baddbmm`: cuBLAS is the fastest dense product there is (measured 770 to 800 TFLOP/s in bfloat16 on an H200).

Operands come through tensor descriptors (the copy engine of Hopper, plain loads on GPUs before it), which want rows of a
multiple of 16 bytes. So X is padded to multiples of 8 numbers by zeros, which stay zero: padded rows and columns change no
other number. The copy that normalizes X pads and transposes it as well.

Legend: N matrices, S the shorter and L the longer side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from celo2 import orthogonalize
from celo2.orthogonalize import COEFFICIENTS, EPS, STEPS

ALIGNMENT = 16  # bytes
GROUP = 8  # tiles of a column that run one after the other, so that they find its operand in the L2 cache


class Tile(NamedTuple):
    """Rows and columns (a multiple of the rows) of a tile of the result, inner numbers at once, warps and pipeline stages."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int


# SMALL: two programs share a multiprocessor (96 of 227 KB of shared memory each), one writes while the other multiplies, and
# the triangle has little waste. LARGE: 1.33 times the FLOPs for each byte from shared memory, one program (144 KB) on each.
SMALL, LARGE = Tile(128, 128, 64, 4, 3), Tile(128, 256, 64, 8, 3)
LARGE_SIDE = 2048
# A matrix of one tile saves nothing.
SMALLEST_SIDE = 256


def newton_schulz(u: Tensor) -> Tensor:
    """`celo2.orthogonalize.newton_schulz`; other dtypes than bfloat16 and matrices with a short side take that one."""
    side = min(u.shape[-2:])
    if u.dtype is not torch.bfloat16 or side < SMALLEST_SIDE:
        return orthogonalize.newton_schulz(u)
    return newton_schulz_tiled(u, LARGE if side >= LARGE_SIDE else SMALL)


def newton_schulz_tiled(u: Tensor, tile: Tile) -> Tensor:
    """Newton–Schulz on u (..., R, C) by tiles of a given size, in the dtype of u."""
    a, b, c = COEFFICIENTS
    tall = u.shape[-2] > u.shape[-1]
    matrices = u.reshape(-1, *u.shape[-2:])  # (N, R, C)
    norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True, dtype=torch.float32)
    matrices = matrices.mT if tall else matrices
    n, short, long = matrices.shape
    step = ALIGNMENT // u.element_size()
    padded = n, *(triton.cdiv(side, step) * step for side in (short, long))
    x = u.new_empty(padded) if padded == matrices.shape else u.new_zeros(padded)
    torch.div(matrices, norm + EPS, out=x[:, :short, :long])
    for _ in range(STEPS):
        gram = symmetric_product(x, 1.0, tile)
        polynomial = symmetric_product(gram, c, tile, addend=b)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x[:, :short, :long]
    return (x.mT if tall else x).reshape(u.shape)


def symmetric_product(x: Tensor, factor: float, tile: Tile, addend: float | None = None) -> Tensor:
    """factor X Xᵀ (N, S, S) of contiguous X (N, S, L), sums in float32; with `addend`, which X symmetric allows, + addend X."""
    n, side, inner = x.shape
    out = x.new_empty(n, side, side)
    rows = x.view(n * side, inner)
    tiles = triton.cdiv(side, tile.rows) * triton.cdiv(side, tile.cols)
    symmetric_kernel[(n * tiles,)](
        TensorDescriptor.from_tensor(rows, [tile.rows, tile.inner]),
        TensorDescriptor.from_tensor(rows, [tile.cols, tile.inner]),
        None if addend is None else x,
        out,
        factor,
        0.0 if addend is None else addend,
        side,
        inner,
        tile.rows,
        tile.cols,
        tile.inner,
        GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


# S and L are compiled in: a model has few shapes, and the loop's length is known.
@triton.jit
def symmetric_kernel(
    left,  # X of all matrices, (N S, L), in blocks (BLOCK_M, BLOCK_K)
    right,  # the same in blocks (BLOCK_N, BLOCK_K)
    addend,  # (N, S, S) or None
    out,  # (N, S, S)
    factor,
    addend_factor,
    S: tl.constexpr,
    L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    down: tl.constexpr = (S + BLOCK_M - 1) // BLOCK_M
    across: tl.constexpr = (S + BLOCK_N - 1) // BLOCK_N
    n, tile = tl.program_id(0) // (down * across), tl.program_id(0) % (down * across)
    first = tile // (GROUP * across) * GROUP
    height = min(down - first, GROUP)
    i = first + tile % (GROUP * across) % height
    j = tile % (GROUP * across) // height
    if (i + 1) * BLOCK_M <= j * BLOCK_N:  # above the diagonal blocks
        return
    # A tile that reaches beyond its matrix multiplies rows of the next one; what comes of them is not stored.
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, L, BLOCK_K):
        x = left.load([n * S + i * BLOCK_M, k])
        y = right.load([n * S + j * BLOCK_N, k])
        total = tl.dot(x, y.T, total, input_precision="ieee")
    total *= factor
    row = (i * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    col = (j * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (row < S) & (col < S)
    matrix = n.to(tl.int64) * S * S
    here = matrix + row.to(tl.int64) * S + col
    if addend is not None:
        total += addend_factor * tl.load(addend + here, mask=mask, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    tl.store(out + here, result, mask=mask)
    if i * BLOCK_M >= (j + 1) * BLOCK_N:  # below the diagonal blocks
        tl.store(out + matrix + col.to(tl.int64) * S + row, result, mask=mask)
