"""What the first rank does for all: it looks at the run's folder and writes there, and the others get the outcome."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import Accelerator

Result = TypeVar("Result")


def on_first_rank(
    accelerator: Accelerator, action: Callable[[], Result], mark: Callable[[str], None] = lambda text: None
) -> Result:
    """What `action` returns on the first rank, on every rank. What it raises there (ValueError, OSError), every rank raises.

    Every rank must call it. So the ranks cannot find different things, and a refusal ends all of them with the same line.
    `mark` is the heartbeat's: until the first rank is done it is one mark behind the others, so that it is named if it hangs.
    They wait for as long as it makes progress.
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
