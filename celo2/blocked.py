"""The passes of the rule on equal matrices, in row blocks that stay in cache: plain torch, for any device.

The driver `celo2.step` calls them in this order. Together they compute what `celo2.rule.update` computes (a test holds them
equal), with these differences:

- The thirty channels exist for one row block at a time, never for a matrix: memory is bounded, whatever the matrix.
- Twelve channels depend on the row or on the column alone; their share of the first layer is a vector per row plus a
  vector per column. Eighteen channels remain for each element.
- The RMS of a channel is a sum that is complete only after all blocks. It needs no pass of its own over the channels:
  its reciprocal is folded into the first layer's weights.
- A sum and its division stand apart, so that a matrix that is split over ranks can complete each sum in between.

Legend: N matrices of R rows and C columns, K = 3 decays, H hidden units, L = 18 element channels (12 local ones, and 6 that are
factored), F features of a buffer, r rows and c columns of a piece, n elements in a block.
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

LOCAL_PLACES, FACTORED_PLACES = places_of(ELEMENT), places_of(FACTORED)  # of the local and of the factored channels in a buffer
N_LOCAL, N_FACTORED = (sum(group.count for group in groups_of(kind)) for kind in (ELEMENT, FACTORED))
# Names of the first-layer weights of what depends on the element, on the row alone and on the column alone.
FIRST_LAYER_PARTS = [[FIRST_LAYER[g.name] for g in groups_of(*kinds)] for kinds in ((ELEMENT, FACTORED), (ROW,), (COLUMN,))]

# Elements of a block. CPU: measured best of 2^13 to 2^18 on two cores with 2 MB of second-level cache each (eighteen
# float32 channels of 65,536 elements are 4.7 MB). Elsewhere a block must be large enough to hide the launches: 4 M
# elements are 300 MB of channels.
BLOCK_ELEMENTS = {"cpu": 1 << 16}
DEFAULT_BLOCK_ELEMENTS = 1 << 22


def block_elements(device: torch.device) -> int:
    """Elements of a block on `device`."""
    return BLOCK_ELEMENTS.get(device.type, DEFAULT_BLOCK_ELEMENTS)


class Factors(NamedTuple):
    """Adafactor's two factors, by the axis of the matrix that they run along."""

    by_row: Tensor  # (N, K, R)
    by_col: Tensor  # (N, K, C)


class FirstLayer(NamedTuple):
    """The first layer for channels that were not normalized, and the share of those that depend on the row or column alone."""

    element: Tensor  # weights (N, H, L)
    by_row: Tensor  # (N, H, R)
    by_col: Tensor  # (N, H, C)


class Passes(NamedTuple):
    """The functions that read every element of a matrix. `PLAIN`, below, is the reference of every other implementation.

    A pass takes stacks whose matrices have one shape and are cut into the same pieces, and returns a row for each of their N
    matrices in all. Sums are over what is here: they are complete when those of all ranks are added.
    """

    accumulate_: Callable[[Rule, Sequence[Stack]], Tensor]
    factor: Callable[[Sequence[Stack], Factors], Tensor]
    emit_: Callable[[Rule, Sequence[Stack], Factors, FirstLayer, Sequence[Sequence[Tensor]]], None]
    newton_schulz: Callable[[Tensor], Tensor]
    apply_: Callable[[Tensor, Tensor, Tensor, Mapping[str, Any]], None]
    gathers: bool  # the passes take one stack, into which small matrices are copied together until they fill a block


def squares_of(pieces: Sequence[Tensor], n: int, device: torch.device) -> Tensor:
    """(N,): the sums of squares of N matrices over their pieces (N, r, c), any float dtype."""
    squares = torch.zeros(n, dtype=torch.float32, device=device)
    for x in pieces:
        squares += torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.promote_types(x.dtype, torch.float32)).square()
    return squares


def tiles(piece: Piece, features: int) -> Iterator[tuple[slice, Tensor]]:
    """Row blocks of a piece, and for each a buffer (N, F, r, c) for F features. All of them share its memory.

    A block of every matrix in the piece together has about `block_elements` elements.
    """
    n, rows, cols = piece.g.shape
    height = max(1, block_elements(piece.g.device) // (n * cols))
    buffer = torch.empty(n, features, min(height, rows) * cols, dtype=torch.float32, device=piece.g.device)
    for start in range(0, rows, height):
        block = slice(start, min(start + height, rows))
        yield block, buffer[:, :, : (block.stop - start) * cols].unflatten(2, (-1, cols))


def load_gradient_(x: Tensor, piece: Piece, block: slice, stack: Stack) -> Tensor:
    """Steps 0 and 1: the gradient of a block, normalized if there is a scale, and clipped, written into x (N, r, c)."""
    x.copy_(piece.g[:, block])
    if stack.gradient_scale is not None:
        x.mul_(stack.gradient_scale[:, None, None])
    if stack.gate is not None:
        x.view(torch.int32).bitwise_and_(stack.gate.bits)
    return x.clamp_(-GRADIENT_CLIP, GRADIENT_CLIP)


def weights_of(decays: Sequence[float], gate: Gate | None) -> list[float | Tensor]:
    """How far accumulators move: 1 - decay of the way, and not at all in a step that `gate` refuses."""
    return [1 - decay if gate is None else gate.taken * (1 - decay) for decay in decays]


def accumulate_(rule: Rule, stacks: Sequence[Stack]) -> Tensor:
    """Steps 1 to 3: move momenta and second moment.

    -> (N, R + C + 12): sums of g² by row, by column, and of every squared local channel.
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
    """Step 4: move the factored second moment by the complete sums (N, R + C + 12) of `accumulate_`."""
    _, rows, cols = stack.shape
    by_row, by_col = (stack.col, stack.row) if rows > cols else (stack.row, stack.col)  # (N, K, R), (N, K, C)
    for k, weight in enumerate(weights_of(rule.factored_decays, stack.gate)):
        by_row[:, k].lerp_(sums[:, :rows] / cols + SQUARE_FLOOR, weight)
        by_col[:, k].lerp_(sums[:, rows : rows + cols] / rows + SQUARE_FLOOR, weight)


def factors_of(stack: Stack) -> Factors:
    """Adafactor's factors from the means of a stack."""
    row_factor = (stack.row / (stack.row.mean(2, keepdim=True) + FACTOR_EPS)).clamp_min(FACTOR_EPS).rsqrt()
    col_factor = stack.col.clamp_min(FACTOR_EPS).rsqrt()
    return Factors(col_factor, row_factor) if stack.shape[1] > stack.shape[2] else Factors(row_factor, col_factor)


def factor(stacks: Sequence[Stack], factors: Factors) -> Tensor:
    """Part of step 6: the sums of the squared factored channels (N, 6)."""
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
    # Put together by name: indexing weights by numbers on the host would make the host wait for a GPU.
    w0_element, w0_row, w0_col = (torch.cat([rule.weights[name] for name in names]) for names in FIRST_LAYER_PARTS)
    row_share = fold(w0_row, row_x.square().mean(2)) @ row_x  # (N, H, ·)
    col_share = fold(w0_col, col_x.square().mean(2)) @ col_x + rule.weights["b0"][:, None]
    by_row, by_col = (col_share, row_share) if rows > cols else (row_share, col_share)
    return FirstLayer(fold(w0_element, element_mean), by_row, by_col)


def emit_(rule: Rule, stacks: Sequence[Stack], factors: Factors, layer: FirstLayer, outs: Sequence[Sequence[Tensor]]) -> None:
    """Step 7: write the direction of every piece of every stack into its tensor (n, r, c) of `outs`, in that tensor's dtype."""
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
    """Step 10, in place: `W <- W - lr (u inverse_rms + weight_decay W)`, in float32 whatever the dtype of w.

    Args:
        w: weights (..., r, c).
        u: direction of the same shape, any float dtype.
        inverse_rms: 1 / RMS of u over a whole matrix or vector, float32, of a shape that broadcasts.
        options: the param group; its `lr` is a number or a tensor of one element.
    """
    lr, weight_decay = options["lr"], options["weight_decay"]
    if isinstance(lr, Tensor) and lr.device != w.device:
        lr = float(lr)
    updated = w.to(torch.promote_types(w.dtype, torch.float32)).mul_(1 - lr * weight_decay).sub_((u * inverse_rms).mul_(lr))
    if updated is not w:
        w.copy_(updated)


PLAIN = Passes(accumulate_, factor, emit_, newton_schulz, apply_, gathers=True)


def fill_local_(x: Tensor, w: Tensor, m: Tensor, v: Tensor) -> None:
    """Write the local channels of w, v (N, r, c) and m (N, K, r, c) into x (N, 12, r, c), which holds the clipped gradient."""
    channel = {name: x[:, place] for name, place in LOCAL_PLACES.items()}
    g, s = channel["gradient"], channel["scale"]
    torch.clamp(g, -SMALL_CLIP, SMALL_CLIP, out=channel["clipped_gradient"])
    channel["weight"].copy_(w[:, None])
    channel["momentum"].copy_(m)  # from here on in float32, whatever their dtype
    channel["second_moment"].copy_(v[:, None])
    torch.add(channel["second_moment"], RSQRT_EPS, out=s).rsqrt_()
    torch.mul(channel["momentum"], s, out=channel["scaled_momentum"])
    torch.mul(g, s, out=channel["scaled_gradient"])


def fill_factored_(x: Tensor, g: Tensor, m: Tensor, by_row_factor: Tensor, by_col_factor: Tensor) -> None:
    """Write the factored channels of g (N, r, c) and m (N, K, r, c) into x (N, 6, r, c); factors (N, K, r) and (N, K, c)."""
    gradient, momentum = x[:, FACTORED_PLACES["factored_gradient"]], x[:, FACTORED_PLACES["factored_momentum"]]
    torch.mul(by_row_factor[..., None], by_col_factor[:, :, None], out=momentum)
    torch.mul(g[:, None], momentum, out=gradient)
    momentum *= m


def square_sums(x: Tensor) -> Tensor:
    """Sum of squares of every channel of x (N, F, r, c): (N, F)."""
    return torch.linalg.vector_norm(x.flatten(2), dim=2).square()


def fold(w0: Tensor, mean_square: Tensor) -> Tensor:
    """First-layer weights (F, H) for channels that were not normalized: (N, H, F), from their mean squares (N, F)."""
    return (w0 * (mean_square + RMS_EPS).rsqrt()[..., None]).mT
