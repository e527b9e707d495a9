"""The rendezvous of the processes: torch's own, made to work after torchrun has restarted the processes.

`torchrun --max-restarts` keeps one store for all attempts (torch 2.13 with its c10d rendezvous). In this store, the ranks of the
second attempt find the addresses of the dead ranks of the first: https://github.com/pytorch/pytorch/issues/135712. So here every
attempt, and every training run in a process, has keys of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

SCHEME = "attempt"


def init_method() -> str:
    """Return the `init_method` with which `init_process_group` uses `meet`."""
    with suppress(RuntimeError):  # already registered by an earlier training run in this process
        register_rendezvous_handler(SCHEME, meet)
    return f"{SCHEME}://"


def attempt() -> str:
    """Return a name for this start of the processes: torchrun's number of restarts, and the number of processes.

    The latter is needed because torchrun does not count restarts that are caused by nodes that join or leave.
    """
    return f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{os.environ.get('WORLD_SIZE', '1')}"


meetings = count()  # numbers the training runs of this process, each of which makes a new rendezvous


def meet(url: str, **options: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """Yield (store, rank, number of processes): torch's rendezvous by environment variables, with a prefix for this attempt."""
    store, rank, world = next(iter(rendezvous("env://", **options)))
    yield dist.PrefixStore(f"attempt/{attempt()}/{next(meetings)}", store), rank, world
