"""Batches of training and validation tokens. They do not depend on the number of processes or the size of a micro-batch.

T: context. B: sequences of a step over all ranks. M: sequences of a micro-batch. Sequence i of a split has the inputs
[i T, (i + 1) T) and the targets [i T + 1, (i + 1) T + 1). So every token except the split's first is a target once per epoch.
The last sequence is filled up with end-of-text inputs and IGNORE targets.
In a mixture, sequences are numbered through all sources, one source after another.
"""

from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from data import DataError
from data.batch_sizes import BatchSizes
from data.mixture import phase_at, sources_of
from data.order import sequence_ids
from data.shards import TokenShards

IGNORE = -100  # the target that torch's cross entropy ignores
MicroBatch = tuple[torch.Tensor, torch.Tensor]  # inputs, targets: (M, T) int64 on the CPU


class Batches:
    """The training batches of a split, from one step of a training run on. Each batch is a pure function of its step.

    batch_size: B, or the B of every step; each must be a multiple of world_size * micro_batch_size. The batch of step `step`,
    counted from 0, begins with sequence number `sequence` of `data.order`. Each later step takes the next B sequences.
    Rank r gets the r-th of world_size contiguous parts of a batch, cut into micro-batches in order.
    A mixture determines which source gives which sequence number. Each source has the same order as it would have alone.
    taken: how many of the first `sequence` sequences each source gave, by its fingerprint; at the beginning none.
    """

    def __init__(
        self,
        shards: TokenShards,
        context: int,
        batch_size: int | BatchSizes,
        seed: int,
        step: int = 0,
        sequence: int = 0,
        taken: Mapping[str, int] | None = None,
    ):
        self.sizes = batch_size if isinstance(batch_size, BatchSizes) else BatchSizes(batch_size)
        if min(context, *self.sizes.sizes) < 1:
            raise DataError(f"context {context} and batch_size {self.sizes.text()} must be positive")
        self.context, self.seed = context, seed
        self.step, self.sequence = step, sequence
        self.sources, self.phases = sources_of(shards)
        if len(self.sources) > 1:
            for source in self.sources:
                if source.n_tokens <= context:
                    raise DataError(
                        f"{source.folder}: {source.n_tokens} tokens, too few for a sequence of {context} and its targets"
                    )
            counts = [(taken or {}).get(source.fingerprint, 0) for source in self.sources]
            if sum(counts) != sequence:
                raise DataError(
                    f"of {sequence} sequences the sources of the mixture gave {sum(counts)}: not a state of this mixture"
                )
        else:
            counts = [sequence]
        self._taken = np.array(counts, np.int64)
        self.tokens_per_epoch = sum(source.n_tokens - 1 for source in self.sources)  # in targets
        self.numbers = Numbers(self.sources, context)
        self.n_sequences = self.numbers.total

    def micro_batches(self, step: int, rank: int, world_size: int, micro_batch_size: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of a step.

        Raises DataError if the sizes do not divide the batch, or a token is not in the vocabulary.
        """
        check_batch_size(self.sizes.at(step), world_size, micro_batch_size)
        ids = self.sequences(step)
        mine = ids.reshape(world_size, -1, micro_batch_size)[rank]
        return [self.numbers.read(part) for part in mine]

    def n_targets(self, step: int) -> int:
        """Return the targets in the whole batch of a step: B T, minus the missing ones of last sequences. Reads no tokens."""
        ids = self.sequences(step)
        return len(ids) * self.context - sum(
            lacking * int((ids == last).sum()) for last, lacking in self.numbers.last_sequences if lacking
        )

    def sequences(self, step: int) -> np.ndarray:
        """Return the numbers (B,) of the step's sequences."""
        order, size = phase_at(self.phases, step).order, self.sizes.at(step)
        which = order[(self.first(step) + np.arange(size)) % len(order)]
        ids = np.empty(size, np.int64)
        before = self._before(step)
        for i in np.unique(which).tolist():
            own, count = which == i, int(self.numbers.counts[i])
            ids[own] = self.numbers.starts[i] + sequence_ids(self.seed, int(before[i]), int(own.sum()), count)
        return ids

    def taken(self, step: int) -> dict[str, int]:
        """Return how many sequences each source of a mixture gave before `step`, by fingerprint; empty without a mixture."""
        counts = self._before(step).tolist()
        return {source.fingerprint: n for source, n in zip(self.sources, counts, strict=True)} if len(counts) > 1 else {}

    def epochs(self, step: int) -> list[float]:
        """Return the number of epochs of each source before `step`."""
        return (self._before(step) / self.numbers.counts).tolist()

    def first(self, step: int) -> int:
        """Return the sequence number with which the batch of `step` begins."""
        return self.sequence + self.sizes.between(self.step, step)

    def _before(self, step: int) -> np.ndarray:
        """Return the number of sequences of each source before `step`, (K,) int64."""
        counts = self._taken
        for phase, following in zip(self.phases, [*self.phases[1:], None], strict=True):
            begin, end = max(self.step, phase.step), step if following is None else min(step, following.step)
            if begin < end:
                counts = counts + phase.count(self.first(end)) - phase.count(self.first(begin))
        return counts


class Numbers:
    """The sequences of T tokens of several sources, numbered through all sources in turn."""

    def __init__(self, sources: list[TokenShards], context: int):
        self.sources, self.context = sources, context
        self.counts = np.array([sequence_count(source, context) for source in sources])  # (K,)
        self.starts = np.cumsum([0, *self.counts[:-1]])  # (K,), the number of each source's first sequence
        self.total = int(self.counts.sum())
        # For each source: the number of its last sequence, and how many targets that sequence lacks.
        self.last_sequences = [
            (start + n - 1, n * context - (source.n_tokens - 1))
            for start, n, source in zip(self.starts.tolist(), self.counts.tolist(), sources, strict=True)
        ]

    def read(self, ids: np.ndarray) -> MicroBatch:
        """Read inputs and targets (M, T) of the sequences `ids` (M,). An id below 0 is a row of padding."""
        inputs = np.full((len(ids), self.context), self.sources[0].eot_id, np.int64)
        targets = np.full((len(ids), self.context), IGNORE, np.int64)
        owners = np.searchsorted(self.starts, ids, "right") - 1
        for row, (i, owner) in enumerate(zip(ids.tolist(), owners.tolist(), strict=True)):
            if i < 0:
                continue
            shards = self.sources[owner]
            start = (i - int(self.starts[owner])) * self.context
            tokens = shards.read(start, min(start + self.context + 1, shards.n_tokens))
            if tokens.max() >= shards.vocab_size:
                _bad_token(shards, start, tokens)
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, : len(tokens) - 1] = tokens[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def check_batch_size(batch_size: int, world_size: int, micro_batch_size: int) -> None:
    """Raise DataError unless every rank gets the same number of whole micro-batches."""
    if min(batch_size, world_size, micro_batch_size) < 1:
        raise DataError(
            f"train.batch_size={batch_size}, train.micro_batch_size={micro_batch_size}, {world_size} process(es): "
            "all must be positive"
        )
    multiple = world_size * micro_batch_size
    below = batch_size // multiple * multiple
    if below != batch_size:
        near = " and ".join(str(size) for size in (below, below + multiple) if size)
        raise DataError(
            f"train.batch_size={batch_size} must be a multiple of {multiple} ({world_size} processes x "
            f"train.micro_batch_size={micro_batch_size}); nearest: {near}"
        )


def fit_micro_batch(batch_size: int, world_size: int, largest: int, name: str = "train.batch_size") -> int:
    """Return the largest micro-batch of at most `largest` sequences that divides a rank's part of the batch.

    Raises DataError if the ranks cannot have equal parts. `name`: the name of the batch size in the message.
    """
    if batch_size % world_size:
        below = batch_size // world_size * world_size
        near = " and ".join(str(size) for size in (below, below + world_size) if size)
        raise DataError(f"{name}={batch_size} must be a multiple of the number of processes, {world_size}; nearest: {near}")
    share = batch_size // world_size
    return next(size for size in range(min(largest, share), 0, -1) if share % size == 0)


def validation_batches(
    shards: TokenShards,
    context: int,
    batch_size: int,
    max_batches: int | None,
    rank: int = 0,
    world_size: int = 1,
    micro_batch_size: int | None = None,
) -> Iterator[MicroBatch]:
    """Yield this rank's part of a fixed set of batch_size * max_batches sequences (all, if max_batches is None).

    The sequences are evenly spread over the split. Each goes to exactly one rank, for any world_size. A batch has
    micro_batch_size rows (by default batch_size). Every rank gets the same number of batches, all of one shape, so that sharded
    models stay in step: missing rows have end-of-text inputs and IGNORE targets. Therefore, sum the loss and the number of
    targets over all ranks, and divide once. In a mixture, each source gives its share by the weights at step 0, or all that it
    has if that is less.
    """
    if min(batch_size, 1 if max_batches is None else max_batches, micro_batch_size or batch_size) < 1:
        raise DataError(f"batch_size {batch_size}, max_batches {max_batches}, rows {micro_batch_size}: must be positive")
    sources, taken = validation_counts(shards, context, None if max_batches is None else batch_size * max_batches)
    numbers = Numbers(sources, context)
    chosen = [
        start + np.arange(some) * count // some for start, count, some in zip(numbers.starts, numbers.counts, taken, strict=True)
    ]
    ids = np.concatenate(chosen)
    n = len(ids)
    share = -(-n // world_size)
    rows = min(micro_batch_size or batch_size, share)
    mine = ids[n * rank // world_size : n * (rank + 1) // world_size]
    mine = np.pad(mine, (0, -(-share // rows) * rows - len(mine)), constant_values=-1)
    for part in mine.reshape(-1, rows):
        yield numbers.read(part)


def validation_counts(shards: TokenShards, context: int, sequences: int | None) -> tuple[list[TokenShards], list[int]]:
    """The sources of a split, and how many of their sequences a validation set of `sequences` takes from each (None: all)."""
    sources, phases = sources_of(shards)
    counts = [sequence_count(source, context) for source in sources]
    wanted = counts if sequences is None else phases[0].count(sequences).tolist()
    return sources, [min(pair) for pair in zip(wanted, counts, strict=True)]


def sequence_count(shards: TokenShards, context: int) -> int:
    """Return the number of sequences of a split, with the last, shorter one. Raises DataError for a split of a single token."""
    if shards.n_tokens < 2:
        raise DataError(f"{shards.folder}: the split {shards.split!r} has a single token")
    return -(-(shards.n_tokens - 1) // context)


def prefetch(
    batches: Batches,
    start: int,
    stop: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    depth: int = 3,
    pin_memory: bool = False,
) -> Generator[list[MicroBatch]]:
    """Yield the micro-batches of steps [start, stop). One background thread prepares up to `depth` steps ahead.

    A micro-batch has at most micro_batch_size rows, a number that divides this rank's part of the step (`fit_micro_batch`).
    next() raises an error of the thread. The thread ends with close(), an error, or the end of the loop.
    """

    def load(step: int) -> list[MicroBatch]:
        rows = fit_micro_batch(batches.sizes.at(step), world_size, micro_batch_size)
        found = batches.micro_batches(step, rank, world_size, rows)
        return [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in found] if pin_memory else found

    thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        ahead = deque(thread.submit(load, step) for step in range(start, min(start + depth, stop)))
        for step in range(start, stop):
            ready = ahead.popleft().result()
            if step + depth < stop:
                ahead.append(thread.submit(load, step + depth))
            yield ready
    finally:
        thread.shutdown(cancel_futures=True)


def _bad_token(shards: TokenShards, start: int, tokens: np.ndarray) -> None:
    at = int(np.argmax(tokens >= shards.vocab_size))
    path, offset = shards.locate(start + at)
    raise DataError(
        f"{path}: token {int(tokens[at])} at offset {offset} is outside the vocabulary of "
        f"{shards.vocab_size}; the file is damaged, see python -m data.verify {shards.folder}"
    )
