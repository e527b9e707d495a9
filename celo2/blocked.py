"""Steps 1 to 7 of the rule for stacks of equal matrices, in row blocks that stay in cache: the fast path on plain torch.

Computes what `celo2.rule.update` computes before Newton–Schulz (a test holds them equal), with these differences:

- The thirty channels exist for one row block at a time, never for a matrix: memory is bounded, whatever the matrix.
- Twelve channels depend on the row or on the column alone; their share of the first layer is a vector per row plus a
  vector per column. Eighteen channels remain for each element.
- The RMS of a channel is a sum that is complete only after all blocks. It needs no pass of its own over the channels:
  its reciprocal is folded into the first layer's weights.
- A sum and its division stand apart, three times (row and column sums, channel square sums, the RMS of the update), so
  that a matrix that is split over ranks can complete each sum in between.

Legend: N matrices of R rows and C columns, K = 3 decays, H hidden units, L = 18 element channels, n elements in a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from celo2.rule import (
    FACTOR_EPS,
    GRADIENT_CLIP,
    GROUP_CHANNELS,
    RMS_EPS,
    RSQRT_EPS,
    SMALL_CLIP,
    SQUARE_FLOOR,
    Rule,
)

# Where the channels of each kind stand among the thirty of `rule.channels`.
LOCAL = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 14)  # g, clipped g, w, m, v, m s, s, g s
FACTORED = (11, 12, 13, 27, 28, 29)  # g and m times row_factor times col_factor
ROW = (15, 16, 17, 21, 22, 23)  # row, rsqrt(row)
COL = (18, 19, 20, 24, 25, 26)  # col, rsqrt(col)

# Elements of a block. CPU: measured best of 2^13 to 2^18 on two cores with 2 MB of second-level cache each (eighteen
# float32 channels of 65,536 elements are 4.7 MB). Elsewhere a block must be large enough to hide the launches: 4 M
# elements are 300 MB of channels.
BLOCK_ELEMENTS = {"cpu": 1 << 16}
DEFAULT_BLOCK_ELEMENTS = 1 << 22


def block_elements(device: torch.device) -> int:
    """Elements of a block on `device`."""
    return BLOCK_ELEMENTS.get(device.type, DEFAULT_BLOCK_ELEMENTS)


def row_blocks(n_matrices: int, rows: int, cols: int, device: torch.device) -> Iterator[slice]:
    """Row slices such that a block of every matrix in the stack has about `block_elements` elements."""
    step = max(1, block_elements(device) // (n_matrices * cols))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class Stack(NamedTuple):
    """N equal matrices with their accumulators, every field with the leading axis N.

    `row` holds the means over the longer axis of a matrix, `col` the means over the shorter one, so that `row` runs along
    the R rows, except where R > C: there it runs along the C columns.
    """

    g: Tensor  # gradient (N, R, C), any float dtype, before clipping
    w: Tensor  # weight (N, R, C), any float dtype
    m: Tensor  # momenta (N, K, R, C), float32
    v: Tensor  # second moment (N, R, C), float32
    row: Tensor  # (N, K, R), or (N, K, C) where R > C, float32
    col: Tensor  # (N, K, C), or (N, K, R) where R > C, float32


def batches(stacks: Iterable[Stack], limit: int) -> Iterator[list[Stack]]:
    """The matrices of all stacks in order, in lists of slices with together at most `limit` matrices."""
    batch: list[Stack] = []
    for stack in stacks:
        start = 0
        while start < len(stack.g):
            room = limit - sum(len(s.g) for s in batch)
            batch.append(Stack(*(field[start : start + room] for field in stack)))
            start += room
            if sum(len(s.g) for s in batch) == limit:
                yield batch
                batch = []
    if batch:
        yield batch


def directions_(rule: Rule, stacks: Iterable[Stack], out: Tensor) -> None:
    """Advance the accumulators of all stacks, whose matrices have one shape, and write their directions into `out` (N, R, C).

    Small matrices are gathered until they fill a block, large ones worked on one by one.
    """
    per_block = max(1, block_elements(out.device) // out[0].numel())
    done = 0
    for batch in batches(stacks, per_block):
        sizes = [len(s.g) for s in batch]
        gathered = batch[0] if len(batch) == 1 else Stack(*(torch.cat(fields) for fields in zip(*batch, strict=True)))
        direction_(rule, gathered, out[done : done + sum(sizes)])
        if len(batch) > 1:
            for field in ("m", "v", "row", "col"):
                torch._foreach_copy_([getattr(s, field) for s in batch], list(getattr(gathered, field).split(sizes)))
        done += sum(sizes)


def direction_(rule: Rule, stack: Stack, out: Tensor) -> None:
    """Advance the accumulators of one stack in place and write its directions u into `out` (N, R, C), in the dtype of `out`."""
    g, w, m, v, row, col = stack
    n, rows, cols = g.shape
    blocks = list(row_blocks(n, rows, cols, g.device))
    tallest = blocks[0].stop
    x_buffer = torch.empty(n, len(LOCAL) + len(FACTORED), tallest * cols, device=g.device)  # (N, L, n)
    h_buffer = torch.empty(n, rule.hidden, tallest * cols, device=g.device)  # (N, H, n)

    def tile(buffer: Tensor, block: slice) -> Tensor:
        height = block.stop - block.start
        return buffer[:, :, : height * cols].unflatten(2, (height, cols))

    # Accumulators; sums of g² over columns and rows; square sums of the local channels.
    row_sum, col_sum = torch.empty(n, rows, device=g.device), torch.zeros(n, cols, device=g.device)
    local_sum = torch.zeros(n, len(LOCAL), device=g.device)
    for block in blocks:
        x = tile(x_buffer, block)
        x[:, 0].copy_(g[:, block]).clamp_(-GRADIENT_CLIP, GRADIENT_CLIP)
        square = x[:, 0].square()
        for k, beta in enumerate(rule.momentum_decays):
            m[:, k, block].lerp_(x[:, 0], 1 - beta)
        v[:, block].lerp_(square, 1 - rule.second_moment_decay)
        row_sum[:, block] = square.sum(2)
        col_sum += square.sum(1)
        fill_local_(x[:, : len(LOCAL)], w[:, block], m[:, :, block], v[:, block])
        local_sum += square_sums(x[:, : len(LOCAL)])

    by_row, by_col = (col, row) if rows > cols else (row, col)  # (N, K, R), (N, K, C)
    for k, gamma in enumerate(rule.factored_decays):
        by_row[:, k].lerp_(row_sum / cols + SQUARE_FLOOR, 1 - gamma)
        by_col[:, k].lerp_(col_sum / rows + SQUARE_FLOOR, 1 - gamma)
    row_factor = (row / (row.mean(2, keepdim=True) + FACTOR_EPS)).clamp_min(FACTOR_EPS).rsqrt()
    col_factor = col.clamp_min(FACTOR_EPS).rsqrt()
    by_row_factor, by_col_factor = (col_factor, row_factor) if rows > cols else (row_factor, col_factor)

    # Square sums of the factored channels, which needed the complete row and column means.
    factored_sum = torch.zeros(n, len(FACTORED), device=g.device)
    for block in blocks:
        x = tile(x_buffer, block)
        x[:, 0].copy_(g[:, block]).clamp_(-GRADIENT_CLIP, GRADIENT_CLIP)
        fill_factored_(x[:, len(LOCAL) :], x[:, 0], m[:, :, block], by_row_factor[:, :, block], by_col_factor)
        factored_sum += square_sums(x[:, len(LOCAL) :])

    # The first layer with the channel normalizers folded in, and the share of the row and column channels.
    row_x = torch.cat([row, (row + RSQRT_EPS).rsqrt()], 1)  # (N, 2K, ·)
    col_x = torch.cat([col, (col + RSQRT_EPS).rsqrt()], 1)
    w0 = torch.cat([rule.weights[f"w0__{i}"] for i in range(len(GROUP_CHANNELS))])  # (30, H)
    element_mean = torch.cat([local_sum, factored_sum], 1) / (rows * cols)  # (N, L)
    w_element = fold(w0[[*LOCAL, *FACTORED]], element_mean)  # (N, H, L)
    row_share = fold(w0[list(ROW)], row_x.square().mean(2)) @ row_x  # (N, H, ·)
    col_share = fold(w0[list(COL)], col_x.square().mean(2)) @ col_x + rule.weights["b0"][:, None]
    by_row_share, by_col_share = (col_share, row_share) if rows > cols else (row_share, col_share)

    w1 = rule.weights["w1"].T.expand(n, -1, -1)
    b1 = rule.weights["b1"][:, None].expand(n, -1, 1)
    w2, b2 = rule.weights["w2"][:, 0], rule.weights["b2"][0]
    for block in blocks:
        x = tile(x_buffer, block)
        x[:, 0].copy_(g[:, block]).clamp_(-GRADIENT_CLIP, GRADIENT_CLIP)
        fill_local_(x[:, : len(LOCAL)], w[:, block], m[:, :, block], v[:, block])
        fill_factored_(x[:, len(LOCAL) :], x[:, 0], m[:, :, block], by_row_factor[:, :, block], by_col_factor)
        h = tile(h_buffer, block)
        torch.add(by_row_share[:, :, block, None], by_col_share[:, :, None, :], out=h)
        h = h.flatten(2).baddbmm_(w_element, x.flatten(2)).relu_()  # (N, H, n)
        h = torch.baddbmm(b1, w1, h).relu_()
        out[:, block] = torch.matmul(w2, h).add_(b2).unflatten(1, (-1, cols))


def fill_local_(x: Tensor, w: Tensor, m: Tensor, v: Tensor) -> None:
    """Write the LOCAL channels into x (N, 12, r, C), whose channel 0 already holds the clipped gradient."""
    g, s = x[:, 0], x[:, 10]
    torch.clamp(g, -SMALL_CLIP, SMALL_CLIP, out=x[:, 1])
    x[:, 2] = w
    x[:, 3:6] = m
    x[:, 6] = v
    torch.add(v, RSQRT_EPS, out=s).rsqrt_()
    torch.mul(m, s[:, None], out=x[:, 7:10])
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
