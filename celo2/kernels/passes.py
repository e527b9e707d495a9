"""The three passes of `celo2.blocked` and step 10 of the rule as Triton kernels: same signatures, same meaning.

A pass over a stack launches one kernel for each of its pieces, for any number of matrices. Work of size O(R + C) stays in plain
torch: the means, the factors, and the first layer with its normalizers. `celo2.step` does it once for all stacks of a batch. So a
stack costs four launches (three passes and `apply_`), and a batch about ninety small ones, including those of Newton–Schulz.

The host never waits for the GPU and needs none of its results, so a step can be captured in a CUDA graph.

Legend: N matrices of R rows and C columns, K = 3 decays, H hidden units, L = 18 element channels. A piece of a matrix has r
rows and c columns, A positions along its major and B along its minor axis (see `celo2.kernels.device`).
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


# Memory-bound passes use 16 elements per thread, which gives several independent 16-byte loads, and tiles so large that their
# partial sums are small in comparison. `emit_kernel` uses 8 elements per thread: each load of a first-layer weight, one for a
# whole warp, then feeds 8 multiply-adds. Compiled for compute capability 9.0 it needs 168 registers without spills (12 warps on
# a multiprocessor) and 2,700 instructions; half of the weights are loaded 290 instructions or more before their use.
TILE, EMIT_TILE = Tile(4096, 8), Tile(1024, 4)
WIDTH = 128  # positions of a tile along the minor axis: 512 contiguous bytes in float32


def view(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor in the form that kernels expect: (tensor, strides...)."""
    return (tensor, *tensor.stride())


def view_or_none(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """`view` of a tensor, or None for None."""
    return None if tensor is None else view(tensor)


def is_transposed(tensor: Tensor) -> bool:
    """Whether a tensor (N, r, c) is contiguous along its rows axis r instead of its columns axis c."""
    return tensor.stride(2) != 1 and tensor.stride(1) == 1


class Cut(NamedTuple):
    """How the kernels see pieces of one size: as (N, A, B), with rows and columns exchanged or not, cut into tiles."""

    transposed: bool
    size: tuple[int, int]  # A and B
    block: tuple[int, int]  # size of a tile: powers of two of at least 16, not much larger than the piece
    tiles: tuple[int, int]  # number of tiles along A and along B

    def fields(self, piece: Piece) -> list[tuple[Any, ...]]:
        """Views of g, w, m and v."""
        return [view(tensor.mT if self.transposed else tensor) for tensor in piece[:4]]

    def along(self, by_row: Tensor, by_col: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        """The parts of `by_row` (N, ..., R) and `by_col` (N, ..., C) at a piece, as (values along A, values along B)."""
        here = by_row[..., piece.rows], by_col[..., piece.cols]
        return here[::-1] if self.transposed else here


def cut_of(tensor: Tensor, tile: Tile) -> Cut:
    """The cut of pieces with the shape and memory order of `tensor` (N, r, c)."""
    transposed = is_transposed(tensor)
    a, b = (tensor.mT if transposed else tensor).shape[1:]
    height, width = (max(16, triton.next_power_of_2(size)) for size in (a, b))
    width = min(WIDTH, width)
    block = min(tile.elements // width, height), width
    return Cut(transposed, (a, b), block, (triton.cdiv(a, block[0]), triton.cdiv(b, block[1])))


def accumulate_(rule: Rule, stacks: Sequence[Stack], tile: Tile = TILE) -> Tensor:
    """`celo2.blocked.accumulate_`."""
    _, rows, cols = stacks[0].shape
    total = sum(stack.shape[0] for stack in stacks)
    sums = torch.zeros(total, rows + cols + N_LOCAL, dtype=torch.float32, device=stacks[0].row.device)
    row_sum, col_sum, local_sum = sums.split([rows, cols, N_LOCAL], 1)
    momentum_weights = tuple(1 - decay for decay in rule.momentum_decays)
    for same in zip(*(stack.pieces for stack in stacks), strict=True):
        first = same[0]
        transposed, (a, b), block, (tiles_a, tiles_b) = cut = cut_of(first.g, tile)
        index = first.rows.start * cols + first.cols.start, *((1, cols) if transposed else (cols, 1))
        by_a, by_b = sums.new_empty(total, tiles_b, a), sums.new_empty(total, tiles_a, b)
        local = sums.new_empty(total, tiles_a * tiles_b, N_LOCAL)
        done = 0
        for stack, piece in zip(stacks, same, strict=True):
            n, fields = stack.shape[0], cut.fields(piece)
            counts, scales = view_or_none(stack.count), view_or_none(stack.gradient_scale)
            gate = None if stack.gate is None else stack.gate.bits
            out = by_a[done:], by_b[done:], local[done:]
            weights = momentum_weights, 1 - rule.second_moment_decay
            launch = accumulate_kernel[(n * tiles_a * tiles_b,)]
            launch(*fields, counts, scales, gate, *out, a, b, *index, *weights, *block, num_warps=tile.warps)
            done += n
        a_sum, b_sum = cut.along(row_sum, col_sum, first)
        a_sum += by_a.sum(1)
        b_sum += by_b.sum(1)
        local_sum += local.sum(1)
    return sums


def factor(stacks: Sequence[Stack], factors: Factors, tile: Tile = TILE) -> Tensor:
    """`celo2.blocked.factor`."""
    total = len(factors.by_row)
    sums = torch.zeros(total, N_FACTORED, dtype=torch.float32, device=factors.by_row.device)
    for same in zip(*(stack.pieces for stack in stacks), strict=True):
        cut = cut_of(same[0].g, tile)
        tiles = cut.tiles[0] * cut.tiles[1]
        partial = sums.new_empty(total, tiles, N_FACTORED)
        done = 0
        for stack, piece in zip(stacks, same, strict=True):
            g, _, m, _ = cut.fields(piece)
            here = [view(along[done:]) for along in cut.along(*factors, piece)]
            launch = factor_kernel[(stack.shape[0] * tiles,)]
            scales, gate = view_or_none(stack.gradient_scale), None if stack.gate is None else stack.gate.bits
            launch(g, m, scales, gate, *here, partial[done:], *cut.size, *cut.block, num_warps=tile.warps)
            done += stack.shape[0]
        sums += partial.sum(1)
    return sums


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
            cut = cut_of(piece.g, tile)
            along = (*cut.along(*factors, piece), *cut.along(layer.by_row, layer.by_col, piece))
            here = [view(tensor[done:]) for tensor in along]
            launch = emit_kernel[(stack.shape[0] * cut.tiles[0] * cut.tiles[1],)]
            gate = None if stack.gate is None else stack.gate.bits
            inputs = *cut.fields(piece), view_or_none(stack.gradient_scale), gate, *here, element[done:], layers
            target = view(out.mT if cut.transposed else out)
            launch(*inputs, target, *cut.size, rule.hidden, *cut.block, num_warps=tile.warps)
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
    cut = cut_of(w, tile)
    w, u = (w.mT, u.mT) if cut.transposed else (w, u)
    rate = (0.0, lr) if on_device else (float(lr), None)
    launch = apply_kernel[(len(w) * cut.tiles[0] * cut.tiles[1],)]
    launch(view(w), view(u), inverse_rms, *rate, float(options["weight_decay"]), *cut.size, *cut.block, num_warps=tile.warps)


TRITON = Passes(accumulate_, factor, emit_, newton_schulz, apply_, gathers=False)
