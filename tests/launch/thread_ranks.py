"""Ranks as threads of one process: a stand-in for `HostGroup`, and strategies that hold any pieces of their parameters."""

import math
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from queue import Queue
from types import SimpleNamespace

import torch

from celo2.distributed.shard import LocalShard
from launch.distributed.strategy import ShardedParameter

WAIT = 60.0  # s after which a rank that waits in vain fails the test


class Later:
    """A handle that acts when someone waits for it."""

    def __init__(self, action=lambda: None):
        self.wait = action


class ThreadHost:
    """As `HostGroup`, between threads."""

    def __init__(self, rank, shared):
        self.rank, self.shared = rank, shared
        self.world, self.divided_over = shared.world, shared.groups
        self.waits = nullcontext
        self.sent = 0  # bytes

    def gather(self, value):
        self.shared.values[self.rank] = value
        self.shared.barrier.wait(WAIT)
        values = list(self.shared.values)
        self.shared.barrier.wait(WAIT)
        return values

    def from_first(self, value):
        return self.gather(value)[0]

    def send(self, tensor, to, tag):
        assert tensor.is_contiguous() and tensor.numel() and to != self.rank
        self.sent += tensor.nbytes
        self.shared.queues[self.rank, to, tag].put(tensor.clone())
        return Later()

    def receive(self, tensor, source, tag):
        return Later(lambda: tensor.copy_(self.shared.queues[source, self.rank, tag].get(timeout=WAIT)))


def hosts(groups):
    """One for each rank. `groups`: the ranks of every group that parameters are divided over."""
    world = sum(map(len, groups))
    shared = SimpleNamespace(world=world, groups=groups, values=[None] * world, barrier=threading.Barrier(world))
    shared.queues = defaultdict(Queue)
    return [ThreadHost(rank, shared) for rank in range(world)]


def on_all(hosts, action):
    """`action(host)` on all ranks at once: results, or the exceptions that it raised."""

    def attempt(host):
        try:
            return action(host)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(attempt, hosts))


def strategy_of(host, weights, states, ranges, keepers=None):
    """What rank `host` holds of whole `weights` and `states` ({name: {key: tensor}}).

    `ranges`: by name the (start, stop) of each rank of a group; without an entry the parameter is whole on all ranks.
    `keepers`: by name the rank that alone keeps the state.
    """
    group = next((ranks for ranks in host.divided_over if host.rank in ranks), None)
    shards, state = {}, defaultdict(dict)
    for name, weight in weights.items():
        if name in ranges:
            start, stop = ranges[name][group.index(host.rank)]
            local = LocalShard(tuple(weight.shape), start, stop, group)
            own = weight.reshape(-1)[start:stop].clone()
        else:
            local, own = LocalShard(tuple(weight.shape), 0, weight.numel()), weight.clone()
        shards[name] = ShardedParameter(own, local, ranges.get(name, []))
        if keepers is not None and keepers[name] != host.rank:
            continue
        for key, value in states.get(name, {}).items():
            if name not in ranges or key in ("row", "col", "step", "count"):
                state[own][key] = value.clone()
            else:
                leading = value.shape[: value.ndim - weight.ndim]
                state[own][key] = value.reshape(*leading, -1)[..., start:stop].clone()
            if name in ranges and key in ("row", "col"):  # the newest means of a matrix are where it lies whole
                size = math.prod(weight.shape[-2:])
                for n in range(weight.numel() // size):
                    begin, end = max(start, n * size), min(stop, (n + 1) * size)
                    whole_elsewhere = any(a <= n * size and (n + 1) * size <= b for a, b in ranges[name])
                    if whole_elsewhere and end - begin < size:
                        state[own][key].view(value.shape[0], weight.numel() // size, -1)[:, n] = torch.nan
    replicas = None
    if keepers is not None:
        owners = {shard.weight: keepers[name] for name, shard in shards.items()}
        replicas = SimpleNamespace(shard_state=True, owners=owners, group=list(range(host.world)))
    optimizer = SimpleNamespace(param_groups=[{"params": [s.weight for s in shards.values()]}], state=state, replicas=replicas)
    config = SimpleNamespace(to_json_string=lambda use_diff: "{}")
    buffers = {"buffer": torch.arange(5)}
    model = SimpleNamespace(config=config)
    return SimpleNamespace(host=host, shards=shards, buffers=buffers, optimizer=optimizer, model=model, average=None)
