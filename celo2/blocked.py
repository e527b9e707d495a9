"""Steps 1 to 7 of the rule for stacks of equal matrices, in row blocks that stay in cache: the fast path on plain torch.

Computes what `celo2.rule.update` computes before Newton–Schulz (a test holds them equal), with these differences:

- The thirty channels exist for one row block at a time, never for a matrix: memory is bounded, whatever the matrix.
- Twelve channels depend on the row or on the column alone; their share of the first layer is a vector per row plus a
  vector per column. Eighteen channels remain for each element.
- The RMS of a channel is a sum that is complete only after all blocks. It needs no pass of its own over the channels:
  its reciprocal is folded into the first layer's weights.
- A sum and its division stand apart, three times (row and column sums, channel square sums, the RMS of the update), so
  that a matrix that is split over ranks can complete each sum in between.

Legend: N matrices of R rows and C columns, K = 3 decays, H hidden units, L = 18 element channels, F features of a
buffer, r rows and c columns of a piece, n elements in a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from celo2.rounding import SECOND_MOMENT_SLOT, lerp_, places
from celo2.rule import (
    COLUMN,
    ELEMENT,
    FACTOR_EPS,
    FACTORED,
    FIRST_LAYER,
    GRADIENT_CLIP,
    RMS_EPS,
    ROW,
    RSQRT_EPS,
    SMALL_CLIP,
    SQUARE_FLOOR,
    Rule,
    groups_of,
)

N_LOCAL, N_FACTORED = (sum(group.count for group in groups_of(kind)) for kind in (ELEMENT, FACTORED))

# Elements of a block. CPU: measured best of 2^13 to 2^18 on two cores with 2 MB of second-level cache each (eighteen
# float32 channels of 65,536 elements are 4.7 MB). Elsewhere a block must be large enough to hide the launches: 4 M
# elements are 300 MB of channels.
BLOCK_ELEMENTS = {"cpu": 1 << 16}
DEFAULT_BLOCK_ELEMENTS = 1 << 22


def block_elements(device: torch.device) -> int:
    """Elements of a block on `device`."""
    return BLOCK_ELEMENTS.get(device.type, DEFAULT_BLOCK_ELEMENTS)


class Piece(NamedTuple):
    """A part of N equal matrices: some of their rows and columns, the same ones of every matrix."""

    g: Tensor  # gradient (N, r, c), any float dtype, before clipping
    w: Tensor  # weight (N, r, c), any float dtype
    m: Tensor  # momenta (N, K, r, c), float32 or bfloat16
    v: Tensor  # second moment (N, r, c), like m
    rows: slice  # which of the R rows
    cols: slice  # which of the C columns


class Stack(NamedTuple):
    """N equal matrices with their accumulators: whole, or those pieces of them that are here.

    `row` holds the means over the longer axis of a matrix, `col` the means over the shorter one, so that `row` runs along
    the R rows, except where R > C: there it runs along the C columns.
    """

    shape: tuple[int, int, int]  # (N, R, C)
    pieces: list[Piece]
    row: Tensor  # (N, K, R), or (N, K, C) where R > C, float32
    col: Tensor  # (N, K, C), or (N, K, R) where R > C, float32
    count: Tensor | None = None  # int32 (N,), the number of this step for each matrix; None where m and v are float32


class Factors(NamedTuple):
    """Adafactor's factors and the accumulators they came from, by the axis of the matrix that they run along."""

    by_row: Tensor  # (N, K, R)
    by_col: Tensor  # (N, K, C)


def whole(g: Tensor, w: Tensor, m: Tensor, v: Tensor, row: Tensor, col: Tensor, count: Tensor | None = None) -> Stack:
    """A stack of matrices that lie in one piece: g, w, v (N, R, C), m (N, K, R, C), row, col and count as in `Stack`."""
    everything = slice(0, g.shape[1]), slice(0, g.shape[2])
    return Stack(tuple(g.shape), [Piece(g, w, m, v, *everything)], row, col, count)


def part_of(stack: Stack, part: slice) -> Stack:
    """The matrices `part` of a stack."""
    n, rows, cols = stack.shape
    if part == slice(0, n):
        return stack
    pieces = [Piece(*(field[part] for field in piece[:4]), piece.rows, piece.cols) for piece in stack.pieces]
    count = None if stack.count is None else stack.count[part]
    return Stack((part.stop - part.start, rows, cols), pieces, stack.row[part], stack.col[part], count)


def batches(stacks: Iterable[Stack], limit: int) -> Iterator[list[tuple[int, Stack]]]:
    """The matrices of all stacks in order, in lists of (number of the stack, slice of it) with at most `limit` matrices."""
    batch: list[tuple[int, Stack]] = []
    room = limit
    for i, stack in enumerate(stacks):
        start, n = 0, stack.shape[0]
        while start < n:
            part = slice(start, min(start + room, n))
            batch.append((i, part_of(stack, part)))
            room -= part.stop - start
            start = part.stop
            if room == 0:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch


def gradient_squares(stack: Stack) -> Tensor:
    """(N,): the sums of g² before any clip, over what is here."""
    squares = torch.zeros(stack.shape[0], device=stack.row.device)
    for piece in stack.pieces:
        dtype = torch.promote_types(piece.g.dtype, torch.float32)
        squares += torch.linalg.vector_norm(piece.g, dim=(1, 2), dtype=dtype).square()
    return squares


def gradient_scale(squares: Tensor, numel: int) -> Tensor:
    """1 / RMS of gradients of `numel` elements, from the complete sums of their squares."""
    return (squares / numel + SQUARE_FLOOR).rsqrt()


def scaled(stack: Stack, scale: Tensor | None) -> Stack:
    """The stack with float32 copies of its gradients, times `scale` (N,); None leaves it as it is."""
    if scale is None:
        return stack
    pieces = [piece._replace(g=(piece.g * scale[:, None, None]).float()) for piece in stack.pieces]
    return stack._replace(pieces=pieces)


def normalized(rule: Rule, stacks: Sequence[Stack]) -> list[Stack]:
    """Step 0, `celo2.rule.normalized_gradient`, on whole matrices of one shape; the stacks themselves where the rule has none."""
    if not rule.normalize_gradient:
        return list(stacks)
    squares = torch.cat([gradient_squares(stack) for stack in stacks])
    scale = gradient_scale(squares, math.prod(stacks[0].shape[1:]))
    return [scaled(s, n_scale) for s, n_scale in zip(stacks, scale.split([s.shape[0] for s in stacks]), strict=True)]


def directions_(rule: Rule, stacks: Iterable[Stack], out: Tensor) -> None:
    """Advance the accumulators of all stacks, whose matrices have one shape, and write their directions into `out` (N, R, C).

    Small matrices are gathered until they fill a block, large ones worked on one by one.
    """
    per_block = max(1, block_elements(out.device) // out[0].numel())
    done = 0
    for numbered in batches(stacks, per_block):
        batch = [stack for _, stack in numbered]
        sizes = [s.shape[0] for s in batch]
        target = out[done : done + sum(sizes)]
        if len(batch) > 1 and all(len(s.pieces) == 1 for s in batch):
            fields = [(*s.pieces[0][:4], s.row, s.col) for s in batch]
            count = None if batch[0].count is None else torch.cat([s.count for s in batch])
            gathered = whole(*(torch.cat(tensors) for tensors in zip(*fields, strict=True)), count)
            direction_(rule, gathered, target)
            piece = gathered.pieces[0]
            moved = zip(*(f[2:] for f in fields), strict=True)
            for own, new in zip(moved, (piece.m, piece.v, gathered.row, gathered.col), strict=True):
                torch._foreach_copy_(list(own), list(new.split(sizes)))
        else:
            for stack, u in zip(batch, target.split(sizes), strict=True):
                direction_(rule, stack, u)
        done += sum(sizes)


def direction_(rule: Rule, stack: Stack, out: Tensor) -> None:
    """Advance the accumulators of one stack in place and write its directions u into `out` (N, R, C), in the dtype of `out`."""
    sums = accumulate_(rule, stack)
    move_means_(rule, stack, sums)
    factors, factored_sums = factor(stack)
    outs = [out[:, piece.rows, piece.cols] for piece in stack.pieces]
    emit_(rule, stack, sums, factors, factored_sums, outs)


def row_blocks(piece: Piece) -> list[slice]:
    """Row slices such that a block of every matrix in the piece has about `block_elements` elements."""
    n, rows, cols = piece.g.shape
    step = max(1, block_elements(piece.g.device) // (n * cols))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def tiles(buffer: Tensor, blocks: list[slice], cols: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows of a block, `buffer` (N, F, ·) as (N, F, r, cols)) for every block."""
    for block in blocks:
        height = block.stop - block.start
        yield block, buffer[:, :, : height * cols].unflatten(2, (height, cols))


def buffer_for(piece: Piece, blocks: list[slice], features: int) -> Tensor:
    """Room for `features` numbers of every element of the tallest block: (N, features, n)."""
    n, _, cols = piece.g.shape
    return torch.empty(n, features, (blocks[0].stop - blocks[0].start) * cols, device=piece.g.device)


def accumulate_(rule: Rule, stack: Stack) -> Tensor:
    """Move momenta and second moment; -> (N, R + C + 12): sums of g² by row, by column, and of every squared local channel.

    Sums over what is here: they are complete when the sums of all ranks that hold pieces of these matrices are added.
    """
    n, rows, cols = stack.shape
    sums = torch.zeros(n, rows + cols + N_LOCAL, device=stack.row.device)
    row_sum, col_sum, local_sum = sums.split([rows, cols, N_LOCAL], 1)
    count = None if stack.count is None else stack.count[:, None, None]
    for piece in stack.pieces:
        blocks = row_blocks(piece)
        for block, x in tiles(buffer_for(piece, blocks, N_LOCAL), blocks, piece.g.shape[2]):
            x[:, 0].copy_(piece.g[:, block]).clamp_(-GRADIENT_CLIP, GRADIENT_CLIP)
            square = x[:, 0].square()
            here = slice(piece.rows.start + block.start, piece.rows.start + block.stop)
            index = None if count is None else places(here, piece.cols, cols, x.device)
            for k, beta in enumerate(rule.momentum_decays):
                lerp_(piece.m[:, k, block], x[:, 0], 1 - beta, index, count, k)
            lerp_(piece.v[:, block], square, 1 - rule.second_moment_decay, index, count, SECOND_MOMENT_SLOT)
            row_sum[:, piece.rows][:, block] += square.sum(2)
            col_sum[:, piece.cols] += square.sum(1)
            fill_local_(x, piece.w[:, block], piece.m[:, :, block], piece.v[:, block])
            local_sum += square_sums(x)
    return sums


def move_means_(rule: Rule, stack: Stack, sums: Tensor) -> None:
    """Move the factored second moment by the complete sums (N, R + C + 12) of `accumulate_`."""
    _, rows, cols = stack.shape
    by_row, by_col = (stack.col, stack.row) if rows > cols else (stack.row, stack.col)  # (N, K, R), (N, K, C)
    for k, gamma in enumerate(rule.factored_decays):
        by_row[:, k].lerp_(sums[:, :rows] / cols + SQUARE_FLOOR, 1 - gamma)
        by_col[:, k].lerp_(sums[:, rows : rows + cols] / rows + SQUARE_FLOOR, 1 - gamma)


def factors_of(stack: Stack) -> Factors:
    """Adafactor's factors from the means of a stack."""
    row_factor = (stack.row / (stack.row.mean(2, keepdim=True) + FACTOR_EPS)).clamp_min(FACTOR_EPS).rsqrt()
    col_factor = stack.col.clamp_min(FACTOR_EPS).rsqrt()
    return Factors(col_factor, row_factor) if stack.shape[1] > stack.shape[2] else Factors(row_factor, col_factor)


def factor(stack: Stack) -> tuple[Factors, Tensor]:
    """-> factors, and (N, 6): the sums of the squared factored channels, over what is here."""
    factors = factors_of(stack)
    sums = torch.zeros(stack.shape[0], N_FACTORED, device=stack.row.device)
    for piece in stack.pieces:
        blocks = row_blocks(piece)
        by_row, by_col = factors.by_row[:, :, piece.rows], factors.by_col[:, :, piece.cols]
        for block, x in tiles(buffer_for(piece, blocks, 1 + N_FACTORED), blocks, piece.g.shape[2]):
            g = x[:, 0].copy_(piece.g[:, block]).clamp_(-GRADIENT_CLIP, GRADIENT_CLIP)
            fill_factored_(x[:, 1:], g, piece.m[:, :, block], by_row[:, :, block], by_col)
            sums += square_sums(x[:, 1:])
    return factors, sums


class FirstLayer(NamedTuple):
    """The first layer for channels that were not normalized, and the share of those that depend on the row or column alone."""

    element: Tensor  # weights (N, H, L)
    by_row: Tensor  # (N, H, R)
    by_col: Tensor  # (N, H, C)


def first_layer(rule: Rule, stack: Stack, sums: Tensor, factored_sums: Tensor) -> FirstLayer:
    """The first layer with the channel normalizers folded in, from the complete sums of both passes."""
    _, rows, cols = stack.shape
    row_x = torch.cat([stack.row, (stack.row + RSQRT_EPS).rsqrt()], 1)  # (N, 2K, ·)
    col_x = torch.cat([stack.col, (stack.col + RSQRT_EPS).rsqrt()], 1)
    element_mean = torch.cat([sums[:, rows + cols :], factored_sums], 1) / (rows * cols)  # (N, L)
    w0_element, w0_row, w0_col = (
        torch.cat([rule.weights[FIRST_LAYER[group.name]] for group in groups_of(*kinds)])
        for kinds in ((ELEMENT, FACTORED), (ROW,), (COLUMN,))
    )
    row_share = fold(w0_row, row_x.square().mean(2)) @ row_x  # (N, H, ·)
    col_share = fold(w0_col, col_x.square().mean(2)) @ col_x + rule.weights["b0"][:, None]
    by_row, by_col = (col_share, row_share) if rows > cols else (row_share, col_share)
    return FirstLayer(fold(w0_element, element_mean), by_row, by_col)


def emit_(rule: Rule, stack: Stack, sums: Tensor, factors: Factors, factored_sums: Tensor, outs: list[Tensor]) -> None:
    """Write the direction of every piece into its tensor of `outs` (N, r, c), from the complete sums of both passes."""
    n = stack.shape[0]
    layer = first_layer(rule, stack, sums, factored_sums)
    w1 = rule.weights["w1"].T.expand(n, -1, -1)
    b1 = rule.weights["b1"][:, None].expand(n, -1, 1)
    w2, b2 = rule.weights["w2"][:, 0], rule.weights["b2"][0]
    for piece, out in zip(stack.pieces, outs, strict=True):
        blocks, width = row_blocks(piece), piece.g.shape[2]
        by_row, by_col = factors.by_row[:, :, piece.rows], factors.by_col[:, :, piece.cols]
        row_h, col_h = layer.by_row[:, :, piece.rows], layer.by_col[:, :, None, piece.cols]
        x_tiles = tiles(buffer_for(piece, blocks, N_LOCAL + N_FACTORED), blocks, width)
        h_tiles = tiles(buffer_for(piece, blocks, rule.hidden), blocks, width)
        for (block, x), (_, h) in zip(x_tiles, h_tiles, strict=True):
            x[:, 0].copy_(piece.g[:, block]).clamp_(-GRADIENT_CLIP, GRADIENT_CLIP)
            fill_local_(x[:, :N_LOCAL], piece.w[:, block], piece.m[:, :, block], piece.v[:, block])
            fill_factored_(x[:, N_LOCAL:], x[:, 0], piece.m[:, :, block], by_row[:, :, block], by_col)
            torch.add(row_h[:, :, block, None], col_h, out=h)
            h = h.flatten(2).baddbmm_(layer.element, x.flatten(2)).relu_()  # (N, H, n)
            h = torch.baddbmm(b1, w1, h).relu_()
            out[:, block] = torch.matmul(w2, h).add_(b2).unflatten(1, (-1, width))


def fill_local_(x: Tensor, w: Tensor, m: Tensor, v: Tensor) -> None:
    """Write the LOCAL channels into x (N, 12, r, C), whose channel 0 already holds the clipped gradient."""
    g, s = x[:, 0], x[:, 10]
    torch.clamp(g, -SMALL_CLIP, SMALL_CLIP, out=x[:, 1])
    x[:, 2] = w
    x[:, 3:6] = m  # from here on in float32, whatever their dtype
    x[:, 6] = v
    torch.add(x[:, 6], RSQRT_EPS, out=s).rsqrt_()
    torch.mul(x[:, 3:6], s[:, None], out=x[:, 7:10])
    torch.mul(g, s, out=x[:, 11])


def fill_factored_(x: Tensor, g: Tensor, m: Tensor, by_row_factor: Tensor, by_col_factor: Tensor) -> None:
    """Write the FACTORED channels into x (N, 6, r, C) from g (N, r, C), m (N, K, r, C) and factors (N, K, r), (N, K, C)."""
    torch.mul(by_row_factor[..., None], by_col_factor[:, :, None], out=x[:, 3:6])
    torch.mul(g[:, None], x[:, 3:6], out=x[:, 0:3])
    x[:, 3:6] *= m


def square_sums(x: Tensor) -> Tensor:
    """Sum of squares of every channel of x (N, F, r, C): (N, F)."""
    return torch.linalg.vector_norm(x.flatten(2), dim=2).square()


def fold(w0: Tensor, mean_square: Tensor) -> Tensor:
    """First-layer weights (F, H) for channels that were not normalized: (N, H, F), from their mean squares (N, F)."""
    return (w0 * (mean_square + RMS_EPS).rsqrt()[..., None]).mT
