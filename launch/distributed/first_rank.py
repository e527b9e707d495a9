"""Runs an action on the first rank, such as reading or writing the run's folder, and sends the outcome to the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import Accelerator

Result = TypeVar("Result")


def on_first_rank(
    accelerator: Accelerator, action: Callable[[], Result], mark: Callable[[str], None] = lambda text: None
) -> Result:
    """Call `action` on the first rank, and return its result on every rank. A ValueError or OSError is raised on every rank.

    Every rank must call it. So all ranks work with the same result, and an error ends all of them with the same line. `mark` is
    the heartbeat's. Until the first rank is done, it is one mark behind the others, so that it is named if it hangs. The others
    wait as long as it makes progress.
    """
    outcome: list[Any] = [None, None]  # result, error
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except (ValueError, OSError) as error:
            outcome[1] = error
    mark("the first rank is done")
    if accelerator.num_processes > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
