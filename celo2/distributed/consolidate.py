"""Collect optimizer state that is divided over replicas (`shard_state`) on one of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from celo2.distributed.collectives import gather_objects, receive, send

State = dict[Tensor, dict[str, Tensor]]


def collect_divided(optimizer: Any, to: int) -> State:
    """On rank `to` of the replicas, return CPU copies of the state that the other ranks keep; on the others return {}.

    Every rank must call this function. It sends nothing if the state is not divided.
    """
    replicas = optimizer.replicas
    if replicas is None or not replicas.shard_state:
        return {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    forms = [
        {key: (tuple(value.shape), value.dtype) for key, value in optimizer.state.get(p, {}).items() if isinstance(value, Tensor)}
        for p in params
    ]
    of_ranks = gather_objects(forms, replicas.group)
    found: State = {}
    for i, p in enumerate(params):
        owner = replicas.owners[p]
        if owner == to:
            continue
        for key, (shape, dtype) in of_ranks[owner][i].items():
            if replicas.rank == owner:
                send(optimizer.state[p][key], to, replicas.group)
            elif replicas.rank == to:
                found.setdefault(p, {})[key] = receive(shape, dtype, p.device, owner, replicas.group).cpu()
    return found


@contextmanager
def whole_state(optimizer: Any) -> Iterator[None]:
    """A context in which `optimizer.state` holds the state of all ranks. Raises RuntimeError if a part is only on other ranks."""
    replicas, own = optimizer.replicas, optimizer.state
    if replicas is None or not replicas.shard_state or replicas.world == 1:
        yield
        return
    if replicas.consolidated is None:
        raise RuntimeError(
            "the optimizer state is divided over the ranks (shard_state=True): call consolidate_state_dict(to=RANK) on all of "
            "them, and then state_dict() on that rank alone"
        )
    params = [p for group in optimizer.param_groups for p in group["params"]]
    whole = {p: own.get(p) or replicas.consolidated.get(p) for p in params}
    others = {key: value for key, value in own.items() if not isinstance(key, Tensor)}
    optimizer.state = defaultdict(dict, {p: state for p, state in whole.items() if state} | others)
    try:
        yield
    finally:
        optimizer.state = own
