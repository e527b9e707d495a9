"""Step 9 of rules with step sizes, over batches: make the tensors of step sizes, fill and read them.

Steps of other rules call nothing in this file. The mathematics is `celo2.rule.step_size_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from celo2.blocked import LOCAL_PLACES
from celo2.rule import Rule, step_size_of
from celo2.stack import Stack
from celo2.vectors import Vector

if TYPE_CHECKING:
    from celo2.step import Item


def with_room(items: Sequence[Item], device: torch.device) -> list[Item]:
    """`items`, each with a tensor `step_size` of ones for its matrices, which steps 0 to 7 fill."""
    found = []
    for item in items:
        part, step_size = item.part, torch.ones(item.part.shape[0], dtype=torch.float32, device=device)
        sized = part._replace(step_size=step_size) if isinstance(part, Vector) else replace(part, step_size=step_size)
        found.append(item._replace(part=sized))
    return found


def write_(rule: Rule, stacks: Sequence[Stack], together: Stack, sums: Tensor) -> None:
    """Write the step sizes of all matrices into `stacks`, from the complete sums (N, R + C + 12) of the pass `accumulate_`."""
    _, rows, cols = together.shape
    means = (sums[:, rows + cols :] / (rows * cols)).T  # (12, N)
    found = step_size_of(rule, means[LOCAL_PLACES["gradient"]][0], means[LOCAL_PLACES["momentum"]])
    for stack, of_stack in zip(stacks, found.split([stack.shape[0] for stack in stacks]), strict=True):
        if stack.step_size is not None:
            stack.step_size.copy_(of_stack)


def of(parts: Sequence[Stack | Vector]) -> Tensor:
    """The step sizes (N,) of all matrices of `parts`."""
    return torch.cat([part.step_size for part in parts if part.step_size is not None])
