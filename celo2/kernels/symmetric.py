"""Newton–Schulz that computes only half of each symmetric product.

Of the three products of an iteration, X Xᵀ and A A (A = X Xᵀ) are symmetric. `symmetric_kernel` computes the tiles on and below
the diagonal, and also writes the transposes of the tiles below it; every number is written once. The FLOPs of an iteration fall
from 6 S³ to 4 S³ for a square matrix, and from 18 S³ to 13 S³ for R : C = 1 : 4. The third product, a X + P X, is not symmetric.
It stays `torch.baddbmm`, as cuBLAS is the fastest dense product (measured 770 to 800 TFLOP/s in bfloat16 on an H200).

The kernel loads operands through tensor descriptors on GPUs with a copy engine and tensor cores that read shared memory (compute
capability 9 and 10), and through pointers on others: compiled for 8.0, a descriptor loads 2 bytes at a time. Both need rows of a
multiple of 16 bytes. So X is padded with zeros to multiples of 8 numbers; these stay zero and change no other number. The copy
that normalizes X also pads and transposes it.

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
GROUP = 8  # tiles of a column that run one after the other, so that they find the operand of the column in the L2 cache


class Tile(NamedTuple):
    """Tile of the result (cols is a multiple of rows), inner block size, warps, pipeline stages, and how operands are loaded."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int
    descriptors: bool


# Chosen by the compiled code, not by measured times: no spills, 16-byte loads, and no more shared memory than every GPU of the
# kind has (`pytest tests/celo2/test_celo2_compiled.py`).
# Hopper. SMALL: two programs share a multiprocessor (96 of 227 KB of shared memory each), so that one writes while the other
# multiplies, and the triangle wastes little. LARGE: 1.33 times the FLOPs per byte of shared memory, one program (144 KB) each.
SMALL, LARGE = Tile(128, 128, 64, 4, 3, True), Tile(128, 256, 64, 8, 3, True)
LARGE_SIDE = 2048
# Compute capability 10: SMALL, which has 4 warps, and LARGE spill 400 bytes per thread where they add the addend.
BLACKWELL = Tile(128, 128, 64, 8, 3, True)
# All other GPUs: 122 to 130 registers and 48 KB of shared memory; a multiprocessor may have as little as 100 KB.
BY_POINTERS = Tile(128, 128, 32, 8, 4, False)
# Matrices with a smaller side take the plain path: with a single tile the kernel saves nothing.
SMALLEST_SIDE = 256


def newton_schulz(u: Tensor) -> Tensor:
    """`celo2.orthogonalize.newton_schulz` by tiles in bfloat16; calls that function for other dtypes and for short sides."""
    side = min(u.shape[-2:])
    if u.dtype is not torch.bfloat16 or side < SMALLEST_SIDE:
        return orthogonalize.newton_schulz(u)
    return newton_schulz_tiled(u, tile_for(side, torch.cuda.get_device_capability(u.device)))


def tile_for(side: int, capability: tuple[int, int]) -> Tile:
    """The tile for matrices with the shorter side `side` on a GPU of this compute capability."""
    if capability[0] == 9:
        return LARGE if side >= LARGE_SIDE else SMALL
    return BLACKWELL if capability[0] == 10 else BY_POINTERS


def newton_schulz_tiled(u: Tensor, tile: Tile) -> Tensor:
    """Newton–Schulz on u (..., R, C) with the given tile, in the dtype of u."""
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
    """factor X Xᵀ (N, S, S) for contiguous X (N, S, L), summed in float32; plus addend X if `addend` is given (X symmetric)."""
    n, side, inner = x.shape
    out = x.new_empty(n, side, side)
    rows = x.view(n * side, inner)
    operands = [TensorDescriptor.from_tensor(rows, [size, tile.inner]) for size in tile[:2]] if tile.descriptors else [x, x]
    tiles = triton.cdiv(side, tile.rows) * triton.cdiv(side, tile.cols)
    symmetric_kernel[(n * tiles,)](
        *operands,
        None if addend is None else x,
        out,
        factor,
        0.0 if addend is None else addend,
        side,
        inner,
        tile.rows,
        tile.cols,
        tile.inner,
        tile.descriptors,
        GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


@triton.jit
def places(rows, cols, R: tl.constexpr, C: tl.constexpr):
    """Offsets of rows x cols in a matrix (R, C), and a mask of those within the matrix."""
    if R * C >= 2**31:
        rows = rows.to(tl.int64)
    return rows * C + cols, (rows < R) & (cols < C)


@triton.jit
def load_rows(matrix, rows, inner, S: tl.constexpr, L: tl.constexpr):
    """Load rows x inner of a matrix (S, L), with zeros beyond its edges."""
    here, mask = places(rows[:, None], inner[None, :], S, L)
    return tl.load(matrix + here, mask=mask, other=0.0)


# S and L are compile-time constants: a model has few shapes, and the length of the loop is then known.
@triton.jit
def symmetric_kernel(
    left,  # X of all matrices: (N S, L) in blocks (BLOCK_M, BLOCK_K), or with DESCRIPTORS false a pointer to (N, S, L)
    right,  # the same in blocks (BLOCK_N, BLOCK_K), or the same pointer
    addend,  # (N, S, S) or None
    out,  # (N, S, S)
    factor,
    addend_factor,
    S: tl.constexpr,
    L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
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
    row, col, inner = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, L, BLOCK_K):
        if DESCRIPTORS:  # a tile beyond the end of its matrix reads rows of the next one; their products are not stored
            x = left.load([n * S + i * BLOCK_M, k])
            y = right.load([n * S + j * BLOCK_N, k])
        else:
            x = load_rows(left + n.to(tl.int64) * S * L, row, k + inner, S, L)
            y = load_rows(right + n.to(tl.int64) * S * L, col, k + inner, S, L)
        total = tl.dot(x, y.T, total, input_precision="ieee")
    total *= factor
    matrix = n.to(tl.int64) * S * S
    here, mask = places(row[:, None], col[None, :], S, S)
    if addend is not None:
        total += addend_factor * tl.load(addend + matrix + here, mask=mask, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    tl.store(out + matrix + here, result, mask=mask)
    if i * BLOCK_M >= (j + 1) * BLOCK_N:  # below the diagonal blocks
        there, mask = places(col[None, :], row[:, None], S, S)
        tl.store(out + matrix + there, result, mask=mask)
