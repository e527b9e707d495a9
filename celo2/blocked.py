"""The passes of the rule on matrices of equal shape, in row blocks that stay in cache: plain torch, for any device.

The driver `celo2.step` calls them in the order of this file. Together they compute the same as `celo2.rule.update` (a test
compares them), but in another way:

- The thirty channels exist for one row block at a time, never for a whole matrix: memory is bounded for every matrix size.
- Twelve channels depend on the row or on the column alone; their share of the first layer is a vector per row plus a
  vector per column. Eighteen channels remain for each element.
- The sum behind the RMS of a channel is complete only after all blocks. Dividing by the RMS needs no extra pass over the
  channels: its reciprocal is folded into the first layer's weights.
- Sums and the divisions by them are in separate functions: in between, ranks that share a matrix can add up their sums.

Legend: N matrices of R rows and C columns, K = 3 decays, H hidden units, L = 18 element channels (12 local and 6 factored
ones), F features of a buffer, r rows and c columns of a piece, n elements in a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from celo2.orthogonalize import newton_schulz
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
    places_of,
)
from celo2.stack import Gate, Piece, Stack

LOCAL_PLACES, FACTORED_PLACES = places_of(ELEMENT), places_of(FACTORED)  # slices of local and of factored channels in a buffer
N_LOCAL, N_FACTORED = (sum(group.count for group in groups_of(kind)) for kind in (ELEMENT, FACTORED))
# Names of the first-layer weights for channels that depend on the element, on the row alone and on the column alone.
FIRST_LAYER_PARTS = [[FIRST_LAYER[g.name] for g in groups_of(*kinds)] for kinds in ((ELEMENT, FACTORED), (ROW,), (COLUMN,))]

# Elements of a block. CPU: the fastest of 2^13 to 2^18, measured on two cores with 2 MB of second-level cache each (eighteen
# float32 channels of 65,536 elements are 4.7 MB). On other devices a block must be large enough to hide the time of kernel
# launches: the channels of 4 M elements take 300 MB.
BLOCK_ELEMENTS = {"cpu": 1 << 16}
DEFAULT_BLOCK_ELEMENTS = 1 << 22


def block_elements(device: torch.device) -> int:
    """Elements of a block on `device`."""
    return BLOCK_ELEMENTS.get(device.type, DEFAULT_BLOCK_ELEMENTS)


class Factors(NamedTuple):
    """Adafactor's two factors, one with an entry for each row, one with an entry for each column."""

    by_row: Tensor  # (N, K, R)
    by_col: Tensor  # (N, K, C)


class FirstLayer(NamedTuple):
    """First-layer weights for unnormalized element channels, and the shares of channels that depend on row or column alone."""

    element: Tensor  # weights (N, H, L)
    by_row: Tensor  # (N, H, R)
    by_col: Tensor  # (N, H, C)


class Passes(NamedTuple):
    """The functions that read every element of a matrix. `PLAIN`, below, is the reference for every other implementation.

    A pass takes stacks of matrices of one shape that are cut into the same pieces. It returns one row for each matrix, N rows
    for all stacks together. Its sums cover this rank's elements only; adding those of all ranks completes them.
    """

    accumulate_: Callable[[Rule, Sequence[Stack]], Tensor]
    factor: Callable[[Sequence[Stack], Factors], Tensor]
    emit_: Callable[[Rule, Sequence[Stack], Factors, FirstLayer, Sequence[Sequence[Tensor]]], None]
    newton_schulz: Callable[[Tensor], Tensor]
    apply_: Callable[[Tensor, Tensor, Tensor, Mapping[str, Any]], None]
    gathers: bool  # the passes take exactly one stack: the driver copies several small matrices into one, up to a block


def squares_of(pieces: Sequence[Tensor], n: int, device: torch.device) -> Tensor:
    """Sums of squares (N,) of N matrices over their pieces (N, r, c) of any float dtype."""
    squares = torch.zeros(n, dtype=torch.float32, device=device)
    for x in pieces:
        squares += torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.promote_types(x.dtype, torch.float32)).square()
    return squares


def tiles(piece: Piece, features: int) -> Iterator[tuple[slice, Tensor]]:
    """Row blocks of a piece, each with a buffer (N, F, r, c) for F features. All buffers share the same memory.

    A block covers the same rows of all N matrices, about `block_elements` elements together.
    """
    n, rows, cols = piece.g.shape
    height = max(1, block_elements(piece.g.device) // (n * cols))
    buffer = torch.empty(n, features, min(height, rows) * cols, dtype=torch.float32, device=piece.g.device)
    for start in range(0, rows, height):
        block = slice(start, min(start + height, rows))
        yield block, buffer[:, :, : (block.stop - start) * cols].unflatten(2, (-1, cols))


def load_gradient_(x: Tensor, piece: Piece, block: slice, stack: Stack) -> Tensor:
    """Steps 0 and 1: write the gradient of a block into x (N, r, c), normalized if the stack has a scale, and clipped."""
    x.copy_(piece.g[:, block])
    if stack.gradient_scale is not None:
        x.mul_(stack.gradient_scale[:, None, None])
    if stack.gate is not None:
        x.view(torch.int32).bitwise_and_(stack.gate.bits)
    return x.clamp_(-GRADIENT_CLIP, GRADIENT_CLIP)


def weights_of(decays: Sequence[float], gate: Gate | None) -> list[float | Tensor]:
    """The weights by which accumulators move: 1 - decay, or 0 in a step that `gate` skips."""
    return [1 - decay if gate is None else gate.taken * (1 - decay) for decay in decays]


def accumulate_(rule: Rule, stacks: Sequence[Stack]) -> Tensor:
    """Steps 1 to 3: update momenta and second moment.

    Returns (N, R + C + 12): sums of g² by row, by column, and the sum of squares of each local channel.
    """
    (stack,) = stacks
    n, rows, cols = stack.shape
    sums = torch.zeros(n, rows + cols + N_LOCAL, dtype=torch.float32, device=stack.row.device)
    row_sum, col_sum, local_sum = sums.split([rows, cols, N_LOCAL], 1)
    count = None if stack.count is None else stack.count[:, None, None]
    *momentum_weights, second_moment_weight = weights_of((*rule.momentum_decays, rule.second_moment_decay), stack.gate)
    for piece in stack.pieces:
        for block, x in tiles(piece, N_LOCAL):
            g = load_gradient_(x[:, 0], piece, block, stack)
            square = g.square()
            here = slice(piece.rows.start + block.start, piece.rows.start + block.stop)
            index = None if count is None else places(here, piece.cols, cols, x.device)
            for k, weight in enumerate(momentum_weights):
                lerp_(piece.m[:, k, block], g, weight, index, count, k)
            lerp_(piece.v[:, block], square, second_moment_weight, index, count, SECOND_MOMENT_SLOT)
            row_sum[:, here] += square.sum(2)
            col_sum[:, piece.cols] += square.sum(1)
            fill_local_(x, piece.w[:, block], piece.m[:, :, block], piece.v[:, block])
            local_sum += square_sums(x)
    return sums


def move_means_(rule: Rule, stack: Stack, sums: Tensor) -> None:
    """Step 4: update the factored second moment from the complete sums (N, R + C + 12) of `accumulate_`."""
    _, rows, cols = stack.shape
    by_row, by_col = (stack.col, stack.row) if rows > cols else (stack.row, stack.col)  # (N, K, R), (N, K, C)
    for k, weight in enumerate(weights_of(rule.factored_decays, stack.gate)):
        by_row[:, k].lerp_(sums[:, :rows] / cols + SQUARE_FLOOR, weight)
        by_col[:, k].lerp_(sums[:, rows : rows + cols] / rows + SQUARE_FLOOR, weight)


def factors_of(stack: Stack) -> Factors:
    """Adafactor's factors, from the factored second moment of a stack."""
    row_factor = (stack.row / (stack.row.mean(2, keepdim=True) + FACTOR_EPS)).clamp_min(FACTOR_EPS).rsqrt()
    col_factor = stack.col.clamp_min(FACTOR_EPS).rsqrt()
    return Factors(col_factor, row_factor) if stack.shape[1] > stack.shape[2] else Factors(row_factor, col_factor)


def factor(stacks: Sequence[Stack], factors: Factors) -> Tensor:
    """Part of step 6: the sums of squares of the factored channels (N, 6)."""
    (stack,) = stacks
    sums = torch.zeros(stack.shape[0], N_FACTORED, dtype=torch.float32, device=stack.row.device)
    for piece in stack.pieces:
        by_row, by_col = factors.by_row[:, :, piece.rows], factors.by_col[:, :, piece.cols]
        for block, x in tiles(piece, 1 + N_FACTORED):
            g = load_gradient_(x[:, 0], piece, block, stack)
            fill_factored_(x[:, 1:], g, piece.m[:, :, block], by_row[:, :, block], by_col)
            sums += square_sums(x[:, 1:])
    return sums


def first_layer(rule: Rule, stack: Stack, sums: Tensor, factored_sums: Tensor) -> FirstLayer:
    """The first layer with the channel normalizers of step 6 folded in, from the complete sums of `accumulate_` and `factor`."""
    _, rows, cols = stack.shape
    row_x = torch.cat([stack.row, (stack.row + RSQRT_EPS).rsqrt()], 1)  # (N, 2K, ·)
    col_x = torch.cat([stack.col, (stack.col + RSQRT_EPS).rsqrt()], 1)
    element_mean = torch.cat([sums[:, rows + cols :], factored_sums], 1) / (rows * cols)  # (N, L)
    # Concatenated by name: indexing a tensor of weights with numbers from the host would make the host wait for the GPU.
    w0_element, w0_row, w0_col = (torch.cat([rule.weights[name] for name in names]) for names in FIRST_LAYER_PARTS)
    row_share = fold(w0_row, row_x.square().mean(2)) @ row_x  # (N, H, ·)
    col_share = fold(w0_col, col_x.square().mean(2)) @ col_x + rule.weights["b0"][:, None]
    by_row, by_col = (col_share, row_share) if rows > cols else (row_share, col_share)
    return FirstLayer(fold(w0_element, element_mean), by_row, by_col)


def emit_(rule: Rule, stacks: Sequence[Stack], factors: Factors, layer: FirstLayer, outs: Sequence[Sequence[Tensor]]) -> None:
    """Steps 5 to 7: write the direction of each piece of each stack into its tensor (n, r, c) of `outs`, in that dtype."""
    (stack,), (targets,) = stacks, outs
    n = stack.shape[0]
    w1, b1 = rule.weights["w1"].T.expand(n, -1, -1), rule.weights["b1"][:, None].expand(n, -1, 1)
    w2, b2 = rule.weights["w2"][:, 0], rule.weights["b2"][0]
    for piece, out in zip(stack.pieces, targets, strict=True):
        by_row, by_col = factors.by_row[:, :, piece.rows], factors.by_col[:, :, piece.cols]
        row_h, col_h = layer.by_row[:, :, piece.rows], layer.by_col[:, :, None, piece.cols]
        for (block, x), (_, h) in zip(tiles(piece, N_LOCAL + N_FACTORED), tiles(piece, len(rule.weights["b0"])), strict=True):
            g = load_gradient_(x[:, 0], piece, block, stack)
            fill_local_(x[:, :N_LOCAL], piece.w[:, block], piece.m[:, :, block], piece.v[:, block])
            fill_factored_(x[:, N_LOCAL:], g, piece.m[:, :, block], by_row[:, :, block], by_col)
            torch.add(row_h[:, :, block, None], col_h, out=h)
            h = h.flatten(2).baddbmm_(layer.element, x.flatten(2)).relu_()  # (N, H, n)
            h = torch.baddbmm(b1, w1, h).relu_()
            out[:, block] = torch.matmul(w2, h).add_(b2).unflatten(1, (-1, piece.g.shape[2]))


def apply_(w: Tensor, u: Tensor, inverse_rms: Tensor | float, options: Mapping[str, Any]) -> None:
    """Step 10, in place: `W <- W - lr (u inverse_rms + weight_decay W)`, in float32 or, for float64 weights, in float64.

    Args:
        w: weights (..., r, c).
        u: direction, of the same shape, any float dtype.
        inverse_rms: 1 / RMS of u over a whole matrix or vector, times its step size if any; float32, broadcasts to u.
        options: the param group; its `lr` is a number or a tensor of one element.
    """
    lr, weight_decay = options["lr"], options["weight_decay"]
    if isinstance(lr, Tensor):  # in 16 bits, 1 - lr * weight_decay would be rounded to 1
        lr = lr.to(torch.promote_types(lr.dtype, torch.float32)) if lr.device == w.device else float(lr)
    updated = w.to(torch.promote_types(w.dtype, torch.float32)).mul_(1 - lr * weight_decay).sub_((u * inverse_rms).mul_(lr))
    if updated is not w:
        w.copy_(updated)


PLAIN = Passes(accumulate_, factor, emit_, newton_schulz, apply_, gathers=True)


def fill_local_(x: Tensor, w: Tensor, m: Tensor, v: Tensor) -> None:
    """Write the local channels from w, v (N, r, c), m (N, K, r, c) into x (N, 12, r, c); x[:, 0] is the clipped gradient."""
    channel = {name: x[:, place] for name, place in LOCAL_PLACES.items()}
    g, s = channel["gradient"], channel["scale"]
    torch.clamp(g, -SMALL_CLIP, SMALL_CLIP, out=channel["clipped_gradient"])
    channel["weight"].copy_(w[:, None])
    channel["momentum"].copy_(m)  # everything after this copy is float32, whatever the dtype of m
    channel["second_moment"].copy_(v[:, None])
    torch.add(channel["second_moment"], RSQRT_EPS, out=s).rsqrt_()
    torch.mul(channel["momentum"], s, out=channel["scaled_momentum"])
    torch.mul(g, s, out=channel["scaled_gradient"])


def fill_factored_(x: Tensor, g: Tensor, m: Tensor, by_row_factor: Tensor, by_col_factor: Tensor) -> None:
    """Write the factored channels from g (N, r, c), m (N, K, r, c) and factors (N, K, r), (N, K, c) into x (N, 6, r, c)."""
    gradient, momentum = x[:, FACTORED_PLACES["factored_gradient"]], x[:, FACTORED_PLACES["factored_momentum"]]
    torch.mul(by_row_factor[..., None], by_col_factor[:, :, None], out=momentum)
    torch.mul(g[:, None], momentum, out=gradient)
    momentum *= m


def square_sums(x: Tensor) -> Tensor:
    """Sums of squares (N, F) of the channels of x (N, F, r, c)."""
    return torch.linalg.vector_norm(x.flatten(2), dim=2).square()


def fold(w0: Tensor, mean_square: Tensor) -> Tensor:
    """Weights (N, H, F) for unnormalized channels: first-layer weights w0 (F, H) times 1 / RMS, from mean squares (N, F)."""
    return (w0 * (mean_square + RMS_EPS).rsqrt()[..., None]).mT
