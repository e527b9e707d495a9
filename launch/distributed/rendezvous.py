"""How the processes find each other: as torch does it, but also when torchrun has started them anew.

`torchrun --max-restarts` keeps one store for all attempts (torch 2.13 with its c10d rendezvous), in which the ranks of the second
one find the addresses of the dead ones of the first: https://github.com/pytorch/pytorch/issues/135712. So every attempt has keys
of its own here, and every training run of a process.
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
    """What `init_process_group` is given, so that it uses `meet`."""
    with suppress(RuntimeError):  # it was registered before, for another training run of this process
        register_rendezvous_handler(SCHEME, meet)
    return f"{SCHEME}://"


def attempt() -> str:
    """What tells this start of the processes from those before: torchrun's number of restarts, and how many processes there are.

    Nodes that come or go make torchrun start anew without counting.
    """
    return f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{os.environ.get('WORLD_SIZE', '1')}"


meetings = count()  # of this process: each training run of it meets anew


def meet(url: str, **options: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """The store of torch's own rendezvous by environment variables, with keys of this attempt; rank; number of processes."""
    store, rank, world = next(iter(rendezvous("env://", **options)))
    yield dist.PrefixStore(f"attempt/{attempt()}/{next(meetings)}", store), rank, world
