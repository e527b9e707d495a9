"""The cosine that all learning-rate schedules use."""

from __future__ import annotations

import math


def cosine(progress: float, final: float) -> float:
    """The factor on a learning rate: half a cosine from 1 at `progress` 0 down to `final` at `progress` 1."""
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
