"""Newton–Schulz: approximate orthogonalization by matrix products alone. It is step 8 of the Celo2 update (arXiv 2602.19142).

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. The rules were meta-trained with these
coefficients and five iterations; other values would invalidate what the rules have learned.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-8


def newton_schulz(u: Tensor) -> Tensor:
    """Push the singular values of every matrix in u (..., R, C) towards 1, keeping its singular vectors.

    The products run in the dtype of u, the Frobenius norm in float32 or wider. The result has the shape and dtype of u.
    """
    a, b, c = COEFFICIENTS
    tall = u.shape[-2] > u.shape[-1]
    norm = torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(u.dtype, torch.float32))
    x = (u / (norm + EPS)).to(u.dtype)
    x = (x.mT if tall else x).flatten(0, -3) if u.ndim > 2 else (x.mT if tall else x)[None]  # (N, min, max)
    for _ in range(STEPS):
        gram = x @ x.mT  # (N, min, min)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x.mT if tall else x
    return x.reshape(u.shape)


def newton_schulz_flops(rows: int, cols: int) -> int:
    """FLOPs (a multiplication and an addition count as two) of `newton_schulz` on one (rows, cols) matrix."""
    short, long = sorted((rows, cols))
    return STEPS * (4 * short * short * long + 2 * short**3)
