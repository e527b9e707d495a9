"""How accumulators move: in float32 without extra work, in bfloat16 with stochastic rounding, so that they do not stall.

A momentum of decay 0.999 moves by a thousandth of its distance to the gradient in one step. bfloat16 keeps 8 bits, a relative
step of 1/256 at best. Rounding to nearest would lose most of these moves in every step. Stochastic rounding rounds up or down
with probabilities that make the mean exact, so that no move is lost on average.

The noise is a hash of element position, step number and accumulator: a repeated run gives the same bits, however its matrices
are sharded or batched. Source of the hash: Wellons, "lowbias32", https://nullprogram.com/blog/2018/07/31/.
"""

from __future__ import annotations

import torch
from torch import Tensor

SECOND_MOMENT_SLOT = 3  # the slots of the three momenta are 0, 1, 2


def int32(bits: int) -> int:
    """The int32 with the lowest 32 bits of `bits`."""
    return (bits + (1 << 31)) % (1 << 32) - (1 << 31)


STEP_FACTOR, SLOT_FACTOR = int32(0x9E3779B9), 0x85EBCA6B
HASH_FACTORS = int32(0x7FEB352D), int32(0x846CA68B)


def lerp_(stored: Tensor, target: Tensor, weight: float | Tensor, index: Tensor | None, count: Tensor | None, slot: int) -> None:
    """`stored <- stored + weight (target - stored)` in place; `target` is float32, `weight` a number or float32 ().

    Without `count` this is `Tensor.lerp_`. With `count`, `stored` is bfloat16: it moves in float32 and is then rounded
    stochastically, with the `noise` of `index`, `count` and `slot`.
    """
    if count is None or index is None:
        stored.lerp_(target, weight)
    else:
        stored.copy_(stochastic_round(stored.float().lerp_(target, weight), noise(index, count, slot)))


def places(rows: slice, cols: slice, width: int, device: torch.device) -> Tensor:
    """Positions row * width + col, int32 (r, c), of the elements `rows` x `cols` of a matrix with `width` columns."""
    row = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=device)
    return row[:, None] * width + torch.arange(cols.start, cols.stop, dtype=torch.int32, device=device)


def noise(index: Tensor, count: Tensor, slot: int) -> Tensor:
    """Pseudo-random int32 in [0, 65536), of the shape that `index` and `count` broadcast to.

    Args:
        index: int32, the position of the element in its own matrix, from `places`.
        count: int32, the number of the step, 1 for the first.
        slot: which accumulator: 0, 1, 2 for the momenta, 3 for the second moment.
    """
    x = index ^ (count * STEP_FACTOR ^ int32(slot * SLOT_FACTOR))
    x ^= shifted(x, 16)
    x *= HASH_FACTORS[0]
    x ^= shifted(x, 15)
    x *= HASH_FACTORS[1]
    x ^= shifted(x, 16)
    return x.bitwise_and_(0xFFFF)


def shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits for int32 as if it were unsigned: the upper bits become zeros."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def stochastic_round(x: Tensor, noise: Tensor) -> Tensor:
    """Round float32 x to one of its two bfloat16 neighbours, chosen by `noise` in [0, 65536); the mean over all noise is x.

    If that neighbour is not finite, or x is infinite or NaN, round to nearest.
    """
    rounded = ((x.view(torch.int32) + noise).bitwise_and_(-0x10000)).view(torch.float32)
    return torch.where(x.isfinite() & rounded.isfinite(), rounded, x).to(torch.bfloat16)
