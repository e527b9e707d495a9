"""Whitening: scale down the components of a direction that are large in most steps. For rules that have it, the start of step 8.

Newton–Schulz equalizes all singular values of a direction, including those of its noise. Multiplying by P_left and P_right turns
the means of u uᵀ and uᵀ u over many steps into multiples of the identity, so that components that are large in every step count
less. Shampoo's preconditioner does the same with gradients (arXiv 1802.09568). Before Newton–Schulz this is known as SOAP-Muon.
Here each step changes P a little, by matrix products alone, as in PSGD (arXiv 2402.04553).

Legend: u (..., R, C): directions of matrices of R rows and C columns, leading axes a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

LEFT, RIGHT = WHITENERS = ("left_whitener", "right_whitener")  # the state holds P - I, which starts at zero like all state
MAX_SIDE = 4096  # longer sides are not whitened: for each matrix with a side of 8192, its P would take 256 MB
# A step multiplies P - I by (1 - LEAK * rate). Without this, P grows without bound along rows that are always zero.
LEAK = 0.05
TINY = 1e-30  # added to the mean square


def whitener_shapes(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of a parameter's whiteners: (..., R, R) and (..., C, C) for a shape (..., R, C); none for sides above MAX_SIDE."""
    return {key: (*shape[:-2], n, n) for key, n in zip(WHITENERS, shape[-2:], strict=True) if n <= MAX_SIDE}


def whiten_(u: Tensor, whiteners: Mapping[str, Tensor], rate: float | Tensor, taken: Tensor | None = None) -> Tensor:
    """Return P_left u P_right divided by its RMS, float32 (..., R, C); then update `whiteners` in place from that result.

    P (stored as P - I) becomes A P A divided by its mean diagonal, with A = I - ρ (S - I). For P_left, S is result resultᵀ / C,
    with trace R; for P_right, S is resultᵀ result / R, with trace C. ρ = rate / (2 + rate |S|), so that A is positive for every
    S. Then P - I decays a little.

    Args:
        u: directions (..., R, C), any float dtype.
        whiteners: P - I, float32, with the shapes of `whitener_shapes`.
        rate: `Rule.whitening`; for several rules at once float32 (..., 1, 1).
        taken: float32 (), 0 in a step that is skipped: then no whitener changes.
    """
    u = u.float()
    if LEFT in whiteners:
        u = u + whiteners[LEFT] @ u
    if RIGHT in whiteners:
        u = u + u @ whiteners[RIGHT]
    u = u * (u.square().mean((-2, -1), keepdim=True) + TINY).rsqrt()
    for key, deviation in whiteners.items():
        moved = moved_by(u if key == LEFT else u.mT, deviation, rate)
        deviation.copy_(moved if taken is None else torch.where(taken > 0, moved, deviation))
    return u


def moved_by(x: Tensor, deviation: Tensor, rate: float | Tensor) -> Tensor:
    """P - I (..., n, n) after a step with directions x (..., n, m) of RMS 1; for P_right, x is the transposed direction.

    With Y = S P (ρ² S / 2 - ρ (1 + ρ) I), A P A is (1 + ρ)² P + Y + Yᵀ. If n > m, S = x xᵀ / m is never materialized.
    """
    n, m = x.shape[-2:]
    small = (x @ x.mT if n <= m else x.mT @ x) / m  # both have the norm |S|
    strength = rate / (2 + rate * torch.linalg.matrix_norm(small, keepdim=True))  # ρ
    p = deviation.clone()
    p.diagonal(dim1=-2, dim2=-1).add_(1)
    left, right = (small, p) if n <= m else (x, x.mT @ p / m)  # left @ right is S P
    twice = right @ small if n <= m else (right @ x) @ (x.mT / m)
    y = left @ (strength.square() / 2 * twice - strength * (1 + strength) * right)
    p.mul_((1 + strength).square()).add_(y + y.mT)
    kept = 1 - LEAK * rate
    p.mul_(kept / p.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None])
    p.diagonal(dim1=-2, dim2=-1).sub_(kept[..., 0] if isinstance(kept, Tensor) else kept)
    return p


def whiten_together_(u: Tensor, parts: Sequence[Mapping[str, Tensor]], rate: float, taken: Tensor | None) -> Tensor:
    """`whiten_` for u (N, R, C) with whiteners in several tensors (n, ·, ·), for N matrices together."""
    if len(parts) == 1:
        return whiten_(u, parts[0], rate, taken)
    together = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    u = whiten_(u, together, rate, taken)
    for key, moved in together.items():
        torch._foreach_copy_([part[key] for part in parts], list(moved.split([len(part[key]) for part in parts])))
    return u


def whitening_flops(rows: int, cols: int) -> int:
    """FLOPs (a multiplication and an addition count as two) of `whiten_` on one (rows, cols) matrix."""
    total = 0
    for n, m in ((rows, cols), (cols, rows)):
        if n <= MAX_SIDE:
            total += 2 * n * n * m + (2 * n * n * m + 4 * n**3 if n <= m else 4 * n * n * m + 6 * n * m * m)
    return total
