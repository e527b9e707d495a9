"""Gathers whole tensors from the local shards of all ranks. Each whole tensor goes to one rank, its owner.

Every rank lists its shares (`list_shares`) in an order that is the same on all ranks without communication. Shares with the same
`turn` are sent at the same time, at most one to each owner, so that no rank holds more than its own shards and one whole tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from celo2.layout import Layout, matrix_count, regions, stacked_shape
from celo2.state import REPLICATED
from celo2.whitening import WHITENERS
from launch.distributed.host_group import HostGroup
from launch.distributed.strategy import ShardedParameter, Strategy

# Means over a matrix, and whiteners. If a matrix is split over ranks, every rank has its newest values; else only the rank that
# has the whole matrix does.
MEANS = ("row", "col", *WHITENERS)
WEIGHTS, STATE, AVERAGES = 0, 1, 2  # kinds of shares; WEIGHTS and AVERAGES each include the buffers
CHECKPOINT_TAG, VERIFICATION_TAG = 0, 1  # tags of the two senders, which may send at the same time
Tensors = dict[str, Tensor]


class Piece(NamedTuple):
    """Elements [start, stop) in each of the `rows` of a share, which `rank` has and the owner needs."""

    rank: int
    start: int
    stop: int


class Share(NamedTuple):
    """A tensor of a checkpoint that this rank owns or has a part of."""

    name: str
    turn: tuple[int, int, int, int]  # sort key of all tensors: kind, -bytes of an element, round, number of the state's key
    owner: int
    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    value: Tensor | None  # this rank's part: (rows, elements from `at` on), in any shape; None: this owner has no part
    rows: int = 1
    at: int = 0
    pieces: tuple[Piece, ...] = ()  # which rank has which elements, as far as the owner needs them
    alone: bool = False  # only one replica has the tensor, and its owner must be told of the share

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def list_shares(strategy: Strategy, by_all: bool) -> list[Share]:
    """Return this rank's shares of weights, buffers, optimizer state (`<parameter>/<key>`) and, if it has begun, the average of
    the weights, in the order of their turns.

    `by_all`: balance the owners by bytes over all ranks that hold a part; if False, the first rank owns everything.
    """
    host, optimizer = strategy.host, strategy.optimizer
    layouts = {p: group.get("matrices") for group in optimizer.param_groups for p in group["params"]}
    owners = choose_owners(strategy) if by_all else dict.fromkeys([*strategy.shards, *strategy.buffers], 0)
    keepers = {name: keeper_of(strategy, shard) for name, shard in strategy.shards.items()}
    kept = {name: keeper for name, keeper in keepers.items() if keeper is not None}
    of_state = {name: owners[name] for name in strategy.shards} | (kept if by_all else {})
    sizes = {name: math.prod(shard.local_shard.shape) for name, shard in strategy.shards.items()}
    sizes |= {name: buffer.numel() for name, buffer in strategy.buffers.items()}
    rounds = {WEIGHTS: number_rounds(owners, sizes), STATE: number_rounds(of_state, sizes)}
    rounds[AVERAGES] = rounds[WEIGHTS]

    def share(kind: int, name: str, key: str, number: int, value: Tensor, owner: int) -> Share | None:
        turn = (kind, -value.element_size(), rounds[kind][name], number)
        if name in strategy.buffers:
            return whole_share(name, turn, owner, value) if owner == host.rank else None
        entry, shard = f"{name}/{key}" if key else name, strategy.shards[name]
        return share_of(
            entry, turn, key, value, shard, layouts.get(shard.weight), owner, host.rank, keepers[name] if key else None
        )

    wholes = {WEIGHTS: {name: shard.weight.detach() for name, shard in strategy.shards.items()}}
    if strategy.average is not None and strategy.average.begun:
        wholes[AVERAGES] = strategy.average.means
    found = []
    for kind, values in wholes.items():
        found += [share(kind, name, "", 0, value, owners[name]) for name, value in (strategy.buffers | values).items()]
    for name, shard in strategy.shards.items():
        state = optimizer.state.get(shard.weight, {})
        found += [share(STATE, name, key, n, state[key], of_state[name]) for n, key in enumerate(sorted(state))]
    return in_order([one for one in found if one is not None])


def in_order(shares: Sequence[Share]) -> list[Share]:
    """Sort shares in the order in which all ranks process them."""
    return sorted(shares, key=lambda share: (share.turn, share.owner))


def choose_owners(strategy: Strategy) -> dict[str, int]:
    """Choose the owner of each weight and buffer: the largest tensor first, each for the least loaded rank that holds a part."""
    host = strategy.host
    sizes: dict[str, tuple[int, list[int]]] = {}  # bytes, ranks to choose from
    for name, shard in strategy.shards.items():
        holding = [rank for rank, (start, stop) in enumerate(shard.ranges) if stop > start]
        ranks = [group[rank] for group in host.divided_over for rank in holding] if shard.ranges else []
        nbytes = math.prod(shard.local_shard.shape) * shard.weight.element_size()
        sizes[name] = nbytes, ranks or list(range(host.world))
    sizes |= {name: (buffer.nbytes, list(range(host.world))) for name, buffer in strategy.buffers.items()}
    loads, owners = [0] * host.world, {}
    for name, (nbytes, ranks) in sorted(sizes.items(), key=lambda item: (-item[1][0], item[0])):
        owners[name] = min(ranks, key=lambda rank: (loads[rank], rank))
        loads[owners[name]] += nbytes
    return owners


def number_rounds(owners: dict[str, int], sizes: dict[str, int]) -> dict[str, int]:
    """Number the rounds in which tensors are sent. Each owner gets its largest first, so that a round's sizes are similar."""
    counts: dict[int, int] = {}
    rounds = {}
    for name in sorted(owners, key=lambda name: (-sizes[name], name)):
        rounds[name] = counts.setdefault(owners[name], 0)
        counts[owners[name]] += 1
    return rounds


def keeper_of(strategy: Strategy, shard: ShardedParameter) -> int | None:
    """Return the only rank that keeps a parameter's optimizer state (`distributed.shard_state`); None: every holder keeps it."""
    replicas = getattr(strategy.optimizer, "replicas", None)
    if replicas is None or not replicas.shard_state or shard.weight not in replicas.owners:
        return None
    return dist.get_process_group_ranks(replicas.group)[replicas.owners[shard.weight]]


def keeps_state(strategy: Strategy, shard: ShardedParameter) -> bool:
    """Return whether this rank keeps the optimizer state of the parameter, if there is any."""
    return keeper_of(strategy, shard) in (None, strategy.host.rank)


def whole_share(name: str, turn: tuple[int, int, int, int], owner: int, value: Tensor) -> Share:
    """Return the share of a tensor that is whole on this rank."""
    return Share(name, turn, owner, tuple(value.shape), value.dtype, value)


def share_of(
    name: str,
    turn: tuple[int, int, int, int],
    key: str,
    value: Tensor,
    shard: ShardedParameter,
    layout: Layout | None,
    owner: int,
    rank: int,
    keeper: int | None = None,
) -> Share | None:
    """Return this rank's share of one tensor of a parameter; None if it neither owns it nor has a needed part.

    Args:
        key: the key of the optimizer state, or "" for the weight.
        value: this rank's part of the tensor.
        layout: the matrices that the parameter stands for.
        keeper: the only rank that has the value, if there is one.
    """
    local = shard.local_shard
    share = whole_share(name, turn, owner, value)
    if local.whole:
        if keeper is not None and keeper != owner:
            share = share._replace(pieces=(Piece(keeper, 0, value.numel()),), alone=True)
        return share if rank in (owner, keeper) else None
    ranks = dist.get_process_group_ranks(local.group)
    if owner not in ranks:
        return None
    if key in MEANS:
        stack = stacked_shape(local.shape, layout)
        rows, matrices = 1 if key in WHITENERS else value.shape[0], matrix_count(stack)
        size = value.numel() // (rows * matrices)
        found = [Piece(ranks[r], first * size, last * size) for r, first, last in whole_matrices(shard, layout)]
        share = share._replace(rows=rows, pieces=tuple(piece for piece in found if piece.rank != owner))
    elif key not in REPLICATED:
        leading = tuple(value.shape[:-1])
        found = [Piece(ranks[r], start, stop) for r, (start, stop) in enumerate(shard.ranges) if stop > start]
        share = share._replace(shape=(*leading, *local.shape), rows=math.prod(leading), at=local.start, pieces=tuple(found))
    return share if rank == owner or any(piece.rank == rank for piece in share.pieces) else None


def whole_matrices(shard: ShardedParameter, layout: Layout | None) -> list[tuple[int, int, int]]:
    """Return (rank in the group, first, last + 1) of matrices that one rank has whole: only that rank has their newest means."""
    shape = shard.local_shard.shape
    stack = stacked_shape(shape, layout)
    if len(stack) < 2:
        return []
    found = []
    for rank, (start, stop) in enumerate(shard.ranges):
        whole = [r.matrices for r in regions(shape, layout, start, stop) if r.is_full(*stack[-2:])]
        found += [(rank, matrices.start, matrices.stop) for matrices in whole]
    return found


class Gathering:
    """The transfer of one share to its owner."""

    def __init__(self, share: Share, host: HostGroup, tag: int) -> None:
        self.share, self.whole, self.works, self.waits = share, None, [], host.waits
        foreign = [piece for piece in share.pieces if piece.rank != share.owner]
        if share.owner != host.rank:
            assert share.value is not None
            rows = share.value.reshape(share.rows, -1)
            mine = [piece for piece in foreign if piece.rank == host.rank]
            self.works = [host.send(row[p.start - share.at : p.stop - share.at], share.owner, tag) for p in mine for row in rows]
            return
        if not foreign and share.value is not None:
            self.whole = share.value.view(share.shape)
            return
        self.whole = torch.empty(share.shape, dtype=share.dtype)
        rows = self.whole.view(share.rows, -1)
        if share.value is not None and share.value.numel():
            own = share.value.reshape(share.rows, -1)
            rows[:, share.at : share.at + own.shape[1]] = own
        self.works = [host.receive(row[p.start : p.stop], p.rank, tag) for p in foreign for row in rows]

    def wait(self) -> Tensor | None:
        """Wait for the transfer. Returns the whole tensor on its owner, None on the other ranks."""
        with self.waits():
            for work in self.works:
                work.wait()
        return self.whole


def gather_in_turn(shares: Sequence[Share], host: HostGroup) -> Iterator[Tensor]:
    """Yield the whole tensors that this rank owns, one after another. Every rank must take part.

    `shares`: this rank's shares, in order and in CPU memory.
    """
    for _, together in itertools.groupby(shares, key=lambda share: share.turn):
        gatherings = [Gathering(share, host, CHECKPOINT_TAG) for share in together]
        found = [whole for whole in [gathering.wait() for gathering in gatherings] if whole is not None]
        del gatherings
        while found:  # at most one; the caller gets the only reference, so that it can free the tensor before the next one
            yield found.pop()


def gather_whole(strategy: Strategy, shard: ShardedParameter, values: Tensors, layout: Layout | None) -> Tensors:
    """Return the whole tensors of `values` of one parameter on the first rank of its group; empty on the other ranks.

    If the parameter is not sharded, every rank gets its own `values` back.

    Args:
        values: the weight and its gradient, and the optimizer state by key.
        layout: the matrices that the parameter stands for.
    """
    local, host = shard.local_shard, strategy.host
    if local.whole:
        return values
    owner = dist.get_process_group_ranks(local.group)[0]
    whole = {}
    for key, value in values.items():
        share = share_of(key, (0, 0, 0, 0), key, value.detach().cpu(), shard, layout, owner, host.rank)
        if share is not None and (tensor := Gathering(share, host, VERIFICATION_TAG).wait()) is not None:
            whole[key] = tensor.to(value.device)
    return whole


def collect(strategy: Strategy) -> Tensors:
    """Return all whole weights and buffers on the CPU of the first rank; empty on the others. Every rank must call it."""
    shares = [share for share in list_shares(strategy, by_all=False) if share.turn[0] == WEIGHTS]
    shares = [share._replace(value=share.value.cpu()) for share in shares if share.value is not None]
    owned = [share.name for share in shares if share.owner == strategy.host.rank]
    return dict(zip(owned, map(torch.clone, gather_in_turn(shares, strategy.host)), strict=True))
