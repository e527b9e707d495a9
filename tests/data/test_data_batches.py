import json
import shutil
import threading

import numpy as np
import pytest
import torch
from whole_batches import join, same, whole

from data import DataError
from data.batches import IGNORE, Batches, prefetch, validation_batches
from data.order import sequence_ids
from data.shards import TokenShards

CONTEXT, BATCH = 64, 8


@pytest.fixture
def batches(train):
    return Batches(train, CONTEXT, BATCH, seed=3)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_world_and_micro_batch_change_nothing(train, world_size, micro_batch_size):
    batches = Batches(train, CONTEXT, 16, seed=3)
    for step in (0, 5, 10**6):
        parts = [batches.micro_batches(step, rank, world_size, micro_batch_size) for rank in range(world_size)]
        assert {len(part) for part in parts} == {16 // world_size // micro_batch_size}
        assert {inputs.shape for part in parts for inputs, _ in part} == {(micro_batch_size, CONTEXT)}
        assert same(join([micro for part in parts for micro in part]), whole(batches, step))


def test_every_token_is_a_target_once_an_epoch(train):
    """Three epochs, whose edges lie within batches."""
    batches = Batches(train, CONTEXT, BATCH, seed=3)
    n, tokens = batches.n_sequences, train.read(0, train.n_tokens)
    assert n % BATCH
    assert batches.tokens_per_epoch == train.n_tokens - 1
    sequences = [bytes(tokens[i * CONTEXT : (i + 1) * CONTEXT + 1]) for i in range(n - 1)]
    assert len(set(sequences)) == n - 1
    rows = join([whole(batches, step) for step in range(-(-3 * n // BATCH))])
    for epoch in range(3):
        inputs, targets = (part[epoch * n : (epoch + 1) * n] for part in rows)
        last = (targets == IGNORE).any(1)
        assert int(last.sum()) == 1
        found = torch.cat([inputs, targets[:, -1:]], 1)[~last].numpy().astype(np.uint16)
        assert sorted(bytes(row) for row in found) == sorted(sequences)
        ending = targets[last][targets[last] != IGNORE].tolist()
        assert ending == tokens[(n - 1) * CONTEXT + 1 :].tolist()
        assert (n - 1) * CONTEXT + len(ending) == batches.tokens_per_epoch


def test_targets_are_the_next_inputs(batches):
    for step in range(40):
        inputs, targets = whole(batches, step)
        assert inputs.dtype == targets.dtype == torch.int64
        valid = targets[:, :-1] != IGNORE
        assert torch.equal(inputs[:, 1:][valid], targets[:, :-1][valid])


def test_last_sequence_is_filled_up(train):
    batches = Batches(train, CONTEXT, 1, seed=0)
    left = batches.tokens_per_epoch - (batches.n_sequences - 1) * CONTEXT
    assert 0 < left < CONTEXT
    step = next(step for step in range(batches.n_sequences) if batches.n_targets(step) < CONTEXT)
    assert batches.n_targets(step) == left
    inputs, targets = whole(batches, step)
    tokens = train.read(train.n_tokens - left - 1, train.n_tokens).astype(np.int64)
    assert inputs[0, :left].tolist() == tokens[:-1].tolist()
    assert targets[0, :left].tolist() == tokens[1:].tolist()
    assert set(targets[0, left:].tolist()) == {IGNORE}
    assert set(inputs[0, left:].tolist()) == {train.eot_id}


def test_n_targets_counts_what_is_there(train):
    for batch_size in (3, 2000):  # the second: several epochs in one batch
        batches = Batches(train, CONTEXT, batch_size, seed=9)
        for step in range(3 if batch_size > 100 else 200):
            assert batches.n_targets(step) == int((whole(batches, step)[1] != IGNORE).sum())


def test_seed(train):
    batches = Batches(train, CONTEXT, BATCH, seed=3)
    assert not same(whole(batches, 0), whole(Batches(train, CONTEXT, BATCH, seed=4), 0))
    assert same(whole(batches, 7), whole(Batches(train, CONTEXT, BATCH, seed=3), 7))


def test_another_batch_size_goes_on_where_the_last_one_ended(train):
    """Batches of 8, then 3, then 16: no sequence twice or left out, over three epochs."""
    taken, step = [], 0
    for batch_size, steps in ((8, 3), (3, 5), (16, 4), (8, 300)):
        batches = Batches(train, CONTEXT, batch_size, 3, step, len(taken))
        step += steps
        for number in range(step - steps, step):
            taken += batches.sequences(number).tolist()
    n = batches.n_sequences
    assert len(taken) > 2 * n and sorted(taken[:n]) == sorted(taken[n : 2 * n]) == list(range(n))
    assert taken == sequence_ids(3, 0, len(taken), n).tolist()


def test_a_context_longer_than_the_split(train):
    batches = Batches(train, train.n_tokens + 10, 2, seed=0)
    assert batches.n_sequences == 1
    assert batches.n_targets(0) == 2 * (train.n_tokens - 1)


def test_sizes_that_do_not_divide(train):
    for sizes, message in (
        (
            (10, 2, 4),
            "train.batch_size=10 must be a multiple of 8 (2 processes x train.micro_batch_size=4); nearest: 8 and 16",
        ),
        (
            (3, 4, 1),
            "train.batch_size=3 must be a multiple of 4 (4 processes x train.micro_batch_size=1); nearest: 4",
        ),
        ((8, 1, 0), "train.batch_size=8, train.micro_batch_size=0, 1 process(es): all must be positive"),
    ):
        with pytest.raises(DataError) as caught:
            Batches(train, CONTEXT, sizes[0], seed=0).micro_batches(0, 0, *sizes[1:])
        assert str(caught.value) == message
    with pytest.raises(DataError, match="context 0 and batch_size 8 must be positive"):
        Batches(train, 0, 8, seed=0)


@pytest.fixture
def too_small_vocabulary(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "copy")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "vocab_size": 256}))
    return TokenShards(folder, "train")


def test_a_token_outside_the_vocabulary(too_small_vocabulary):
    shards = too_small_vocabulary
    tokens = shards.read(0, shards.n_tokens)
    place = 5000 + int(np.flatnonzero(tokens[5000:] == 256)[0])
    batches = Batches(shards, 1, 1, seed=0)
    step = next(s for s in range(batches.n_sequences) if sequence_of(batches, s) == place - 1)
    with pytest.raises(DataError, match=rf"train_00001.bin: token 256 at offset {place - 5000} is outside the vocabulary of 256"):
        batches.micro_batches(step, 0, 1, 1)


def sequence_of(batches, step) -> int:
    return int(sequence_ids(batches.seed, step, 1, batches.n_sequences)[0])


@pytest.mark.parametrize("max_batches", [None, 5, 10**6])
def test_validation_is_the_same_for_any_world(train, max_batches):
    reference = join(validation_batches(train, CONTEXT, 6, max_batches))
    count = Batches(train, CONTEXT, 1, 0).n_sequences
    keep = reference[1][:, 0] != IGNORE
    reference = tuple(part[keep] for part in reference)
    assert len(reference[0]) == (30 if max_batches == 5 else count)
    assert len(np.unique(reference[0].numpy(), axis=0)) == len(reference[0])
    for world_size in (1, 2, 3, 7):
        for micro_batch_size in (None, 1, 4):
            ranks = [
                list(validation_batches(train, CONTEXT, 6, max_batches, r, world_size, micro_batch_size))
                for r in range(world_size)
            ]
            assert len({len(rank) for rank in ranks}) == 1
            assert len({inputs.shape for rank in ranks for inputs, _ in rank}) == 1
            rows = join([batch for rank in ranks for batch in rank])
            keep = rows[1][:, 0] != IGNORE
            assert same([part[keep] for part in rows], reference)
            assert set(rows[0][~keep].flatten().tolist()) <= {train.eot_id}


def test_validation_is_evenly_spread(train):
    tokens = train.read(0, train.n_tokens).astype(np.int64)
    total = Batches(train, CONTEXT, 1, 0).n_sequences
    inputs, _ = join(validation_batches(train, CONTEXT, 2, 5))
    starts = [i * total // 10 * CONTEXT for i in range(10)]
    assert [row.tolist() for row in inputs] == [tokens[start : start + CONTEXT].tolist() for start in starts]


def test_validation_with_more_ranks_than_sequences(train):
    ranks = [list(validation_batches(train, CONTEXT, 1, 2, rank, 5)) for rank in range(5)]
    assert [len(rank) for rank in ranks] == [1] * 5
    assert sum(int((targets != IGNORE).sum()) for rank in ranks for _, targets in rank) == 2 * CONTEXT
    with pytest.raises(DataError, match="must be positive"):
        list(validation_batches(train, CONTEXT, 0, 1))


def prefetch_threads() -> int:
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_prefetch_yields_what_batches_would(batches):
    found = list(prefetch(batches, 2, 9, 1, 2, 2))
    expected = [batches.micro_batches(step, 1, 2, 2) for step in range(2, 9)]
    assert len(found) == 7
    assert all(same(a, b) for f, e in zip(found, expected, strict=True) for a, b in zip(f, e, strict=True))
    assert prefetch_threads() == 0
    assert list(prefetch(batches, 5, 5, 0, 1, 1)) == []


def test_prefetch_is_ahead_by_depth_and_ends_when_closed(train):
    asked, enough = [], threading.Event()

    class Recorder(Batches):
        def micro_batches(self, step, *sizes):
            asked.append(step)
            if step == 3:
                enough.set()
            return super().micro_batches(step, *sizes)

    steps = prefetch(Recorder(train, CONTEXT, BATCH, 0), 0, 10**9, 0, 1, BATCH, depth=3)
    next(steps)
    assert enough.wait(10)  # step 0 is out; 1, 2 and 3 are ready or being made
    assert asked == [0, 1, 2, 3]
    assert prefetch_threads() == 1
    steps.close()
    assert prefetch_threads() == 0
    assert asked == [0, 1, 2, 3]


def test_prefetch_ends_when_the_consumer_fails(batches):
    def consume():
        for _ in prefetch(batches, 0, 100, 0, 1, 1):
            raise RuntimeError("the consumer's own")

    with pytest.raises(RuntimeError, match="the consumer's own"):
        consume()
    assert prefetch_threads() == 0


def test_prefetch_raises_the_thread_s_error(too_small_vocabulary):
    steps = prefetch(Batches(too_small_vocabulary, CONTEXT, BATCH, 0), 0, 100, 0, 1, 1)
    with pytest.raises(DataError, match="outside the vocabulary of 256"):
        list(steps)
    assert prefetch_threads() == 0
    with pytest.raises(DataError, match="must be a multiple of the number of processes, 3"):
        list(prefetch(Batches(too_small_vocabulary, CONTEXT, BATCH, 0), 0, 100, 0, 3, 1))
