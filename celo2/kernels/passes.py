"""The three passes of `celo2.blocked` and the last step of the rule as Triton kernels: same signatures, same meaning.

A pass over a stack is one launch for each of its pieces, whatever the number of matrices. What is of size O(R + C), the means,
the factors, the first layer with its normalizers, stays plain torch; `celo2.step` does it once for all stacks of a batch, so
that a stack costs four launches (three passes and `apply_`) and a batch about ninety small ones, Newton–Schulz among them.

Nothing here waits for the GPU or depends on what it computed, so a step can be captured in a CUDA graph.

Legend: N matrices of R rows and C columns, K = 3 decays, H hidden units, L = 18 element channels. A piece of a matrix has r
rows and c columns, A places along its major and B along its minor axis (see `celo2.kernels.device`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from celo2 import blocked
from celo2.blocked import N_FACTORED, N_LOCAL, Factors, FirstLayer, Passes
from celo2.kernels.device import accumulate_kernel, apply_kernel, emit_kernel, factor_kernel
from celo2.kernels.symmetric import newton_schulz
from celo2.rule import Rule
from celo2.stack import Piece, Stack


class Tile(NamedTuple):
    """Elements of a tile and warps of a program."""

    elements: int
    warps: int


# Passes bound by memory take 16 elements a thread, several independent 16-byte loads, and tiles whose partial sums are small
# beside them. `emit_kernel` takes 8 elements a thread: each load of a first-layer weight, one for a whole warp, then feeds 8
# multiply-adds. Compiled for compute capability 9.0 that is 168 registers without spills, 12 warps on a multiprocessor, and
# 2,700 instructions, half of the weights loaded 290 instructions or more before their use.
TILE, EMIT_TILE = Tile(4096, 8), Tile(1024, 4)
WIDTH = 128  # places along the minor axis: 512 contiguous bytes in float32


def blocks(shape: Sequence[int], tile: Tile) -> tuple[int, int]:
    """(A, B) of a tile of a piece of `shape` (N, A, B): powers of two from 16 on, not much larger than the piece."""
    height, width = (max(16, triton.next_power_of_2(size)) for size in shape[1:])
    width = min(WIDTH, width)
    return min(tile.elements // width, height), width


def grid(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, int]:
    """Tiles along A and along B of a piece of `shape` (N, A, B)."""
    return triton.cdiv(shape[1], block[0]), triton.cdiv(shape[2], block[1])


def view(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor as the kernels take it."""
    return (tensor, *tensor.stride())


def view_or_none(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """The same, where there may be none."""
    return None if tensor is None else view(tensor)


def is_transposed(tensor: Tensor) -> bool:
    """Whether the rows of (N, r, c), not its columns, lie beside each other in memory."""
    return tensor.stride(2) != 1 and tensor.stride(1) == 1


def turned(piece: Piece, transposed: bool) -> Piece:
    """The piece as (N, A, B): as it is, or with rows and columns exchanged."""
    if not transposed:
        return piece
    return Piece(piece.g.mT, piece.w.mT, piece.m.mT, piece.v.mT, piece.cols, piece.rows)


def accumulate_(rule: Rule, stacks: Sequence[Stack], tile: Tile = TILE) -> Tensor:
    """`celo2.blocked.accumulate_`."""
    _, rows, cols = stacks[0].shape
    total = sum(stack.shape[0] for stack in stacks)
    sums = torch.zeros(total, rows + cols + N_LOCAL, device=stacks[0].row.device)
    row_sum, col_sum, local_sum = sums.split([rows, cols, N_LOCAL], 1)
    momentum_weights = tuple(1 - decay for decay in rule.momentum_decays)
    for same in zip(*(stack.pieces for stack in stacks), strict=True):
        transposed = is_transposed(same[0].g)
        a_sum, b_sum = (col_sum, row_sum) if transposed else (row_sum, col_sum)
        index_strides = (1, cols) if transposed else (cols, 1)
        first = turned(same[0], transposed)
        (_, a, b), block = first.g.shape, blocks(first.g.shape, tile)
        tiles_a, tiles_b = grid(first.g.shape, block)
        by_a = sums.new_empty(total, tiles_b, a)
        by_b = sums.new_empty(total, tiles_a, b)
        local = sums.new_empty(total, tiles_a * tiles_b, N_LOCAL)
        done = 0
        for stack, piece in zip(stacks, same, strict=True):
            p, n = turned(piece, transposed), stack.shape[0]
            accumulate_kernel[(n * tiles_a * tiles_b,)](
                view(p.g),
                view(p.w),
                view(p.m),
                view(p.v),
                view_or_none(stack.count),
                view_or_none(stack.gradient_scale),
                by_a[done:],
                by_b[done:],
                local[done:],
                a,
                b,
                p.rows.start * index_strides[0] + p.cols.start * index_strides[1],
                *index_strides,
                momentum_weights,
                1 - rule.second_moment_decay,
                *block,
                num_warps=tile.warps,
            )
            done += n
        a_sum[:, first.rows] += by_a.sum(1)
        b_sum[:, first.cols] += by_b.sum(1)
        local_sum += local.sum(1)
    return sums


def factor(stacks: Sequence[Stack], factors: Factors, tile: Tile = TILE) -> Tensor:
    """`celo2.blocked.factor`."""
    total = len(factors.by_row)
    sums = torch.zeros(total, N_FACTORED, device=factors.by_row.device)
    for same in zip(*(stack.pieces for stack in stacks), strict=True):
        transposed = is_transposed(same[0].g)
        first = turned(same[0], transposed)
        (_, a, b), block = first.g.shape, blocks(first.g.shape, tile)
        tiles_a, tiles_b = grid(first.g.shape, block)
        partial = sums.new_empty(total, tiles_a * tiles_b, N_FACTORED)
        done = 0
        for stack, piece in zip(stacks, same, strict=True):
            p, n = turned(piece, transposed), stack.shape[0]
            factor_a, factor_b = turned_pair(*factors, piece, transposed)
            factor_kernel[(n * tiles_a * tiles_b,)](
                view(p.g),
                view(p.m),
                view_or_none(stack.gradient_scale),
                view(factor_a[done:]),
                view(factor_b[done:]),
                partial[done:],
                a,
                b,
                *block,
                num_warps=tile.warps,
            )
            done += n
        sums += partial.sum(1)
    return sums


def turned_pair(by_row: Tensor, by_col: Tensor, piece: Piece, transposed: bool) -> tuple[Tensor, Tensor]:
    """What runs along the rows and the columns of a matrix, (N, F, R) and (N, F, C), at the piece: along A, and along B."""
    here = by_row[:, :, piece.rows], by_col[:, :, piece.cols]
    return here[::-1] if transposed else here


def emit_(
    rule: Rule,
    stacks: Sequence[Stack],
    factors: Factors,
    layer: FirstLayer,
    outs: Sequence[Sequence[Tensor]],
    tile: Tile = EMIT_TILE,
) -> None:
    """`celo2.blocked.emit_`."""
    weights = rule.weights
    layers = torch.cat([weights["w1"].flatten(), weights["b1"], weights["w2"][:, 0], weights["b2"][:1]])
    element = layer.element.mT.contiguous()  # (N, L, H)
    done = 0
    for stack, targets in zip(stacks, outs, strict=True):
        for piece, out in zip(stack.pieces, targets, strict=True):
            transposed = is_transposed(piece.g)
            p = turned(piece, transposed)
            block = blocks(p.g.shape, tile)
            tiles_a, tiles_b = grid(p.g.shape, block)
            factor_a, factor_b = turned_pair(*factors, piece, transposed)
            share_a, share_b = turned_pair(layer.by_row, layer.by_col, piece, transposed)
            emit_kernel[(stack.shape[0] * tiles_a * tiles_b,)](
                view(p.g),
                view(p.w),
                view(p.m),
                view(p.v),
                view_or_none(stack.gradient_scale),
                view(factor_a[done:]),
                view(factor_b[done:]),
                view(share_a[done:]),
                view(share_b[done:]),
                element[done:],
                layers,
                view(out.mT if transposed else out),
                *p.g.shape[1:],
                rule.hidden,
                *block,
                num_warps=tile.warps,
            )
        done += stack.shape[0]


def apply_(w: Tensor, u: Tensor, inverse_rms: Tensor, options: Mapping[str, Any], tile: Tile = TILE) -> None:
    """`celo2.blocked.apply_` on w, u (N, r, c), inverse_rms (N, 1, 1); a learning rate on the GPU stays there.

    The kernel computes in float32; float64 weights take the plain path.
    """
    if w.dtype is torch.float64:
        blocked.apply_(w, u, inverse_rms, options)
        return
    lr = options["lr"]
    on_device = isinstance(lr, Tensor) and lr.device == w.device
    w, u = (w.mT, u.mT) if is_transposed(w) else (w, u)
    block = blocks(w.shape, tile)
    tiles_a, tiles_b = grid(w.shape, block)
    apply_kernel[(len(w) * tiles_a * tiles_b,)](
        view(w),
        view(u),
        inverse_rms,
        0.0 if on_device else float(lr),
        lr if on_device else None,
        float(options["weight_decay"]),
        *w.shape[1:],
        *block,
        num_warps=tile.warps,
    )


TRITON = Passes(accumulate_, factor, emit_, newton_schulz, apply_, gathers=False)
