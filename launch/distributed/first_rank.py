"""What the first rank does for all: it looks at the run's folder and writes there, and the others get the outcome."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import Accelerator

from configs.load import ConfigError

Result = TypeVar("Result")


def on_first_rank(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """What `action` returns on the first rank, on every rank. What it raises there (ValueError, OSError), every rank raises.

    Every rank must call it. So the ranks cannot find different things, and a refusal ends all of them with the same line.
    """
    outcome: list[Any] = [None, None]  # result, error
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except (ValueError, OSError) as error:
            outcome[1] = error
    if accelerator.num_processes > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def refuse_tasks_without_launcher() -> None:
    """Raise ConfigError if Slurm started this command several times, and nothing tells the processes of each other."""
    tasks, variables = os.environ.get("SLURM_NTASKS", "1"), os.environ
    if "SLURM_PROCID" in variables and "WORLD_SIZE" not in variables and tasks.isdigit() and int(tasks) > 1:
        raise ConfigError(
            f"Slurm starts {tasks} tasks (SLURM_NTASKS) and no launcher joins them; each would train alone: start torchrun "
            "under srun, as launch/cluster/slurm.sbatch does, or one task (srun -n 1)"
        )
