"""Mixtures: which source a sequence comes from, and that a batch is a pure function of seed and step."""

import json
import random
import shutil

import numpy as np
import pytest
from whole_batches import join, same, whole

from data import DataError
from data.batches import Batches, validation_batches
from data.mixture import Mixture, Phase, spread, whole_parts
from data.order import sequence_ids
from data.prepare import prepare
from data.shards import TokenShards

CONTEXT, BATCH = 32, 12
WEIGHTS = ({0: 0.7, 10: 0.2}, {0: 0.3, 10: 0.2}, {0: 0, 10: 0.6})


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_texts, write_jsonl):
    """Three sources of different length, of which two have folders of one name."""
    root = tmp_path_factory.mktemp("sources")
    found = []
    for i, (name, count) in enumerate((("web", 120), ("code", 40), ("old/web", 25))):
        (root / name).parent.mkdir(exist_ok=True)
        corpus = write_jsonl(root / f"{i}.jsonl", make_texts(count, seed=i + 1))
        options = {"tokenizer": "bytes", "val_fraction": 0.2, "shard_tokens": 3000, "workers": 1}
        found.append(prepare(str(corpus), root / name, **options, log=lambda line: None))
    return found


def mixture(folders, split="train", weights=WEIGHTS):
    return Mixture([TokenShards(folder, split) for folder in folders], weights[: len(folders)])


@pytest.fixture(scope="module")
def mixed(folders):
    return mixture(folders)


def test_counts_follow_the_weights_to_within_one():
    rng = random.Random(0)
    cases = [[rng.choice([rng.random(), rng.random() ** 4 + 0.001, 1.0]) for _ in range(rng.randint(1, 12))] for _ in range(4)]
    for weights in [
        [0.7, 0.3],
        [1, 1, 1],
        [1 / 3, 2 / 3],
        [5, 0, 2],
        [1e-3, 1],
        *([round(w, 2) + 0.01 for w in case] for case in cases),
    ]:
        parts = whole_parts(weights)
        phase = Phase(0, weights)
        counts = np.array([phase.count(g) for g in range(3 * len(phase.order) + 2)])
        assert (counts.sum(1) == np.arange(len(counts))).all() and (np.diff(counts, axis=0) >= 0).all()
        shares = np.array(parts) / sum(parts)
        assert np.abs(counts - np.arange(len(counts))[:, None] * shares).max() < 1
        assert counts[3][np.array(weights) == 0].sum() == 0


def test_shares_are_exact_where_a_period_of_ten_thousand_allows():
    assert whole_parts([0.7, 0.3]) == [7, 3] and whole_parts([14, 6]) == [7, 3] and whole_parts([1e-3, 0.999]) == [1, 999]
    assert whole_parts([1 / 3, 1 / 3, 1 / 3]) == [1, 1, 1]
    parts = whole_parts([0.123456, 0.2, 0.676544])
    assert sum(parts) == 10_000 and parts == [1235, 2000, 6765]
    assert spread([1, 1, 1]).tolist() == [0, 1, 2] and spread([2, 2]).tolist() == [0, 1, 0, 1]


def test_a_mixture_of_one_source_is_that_source(folders):
    alone, mixed = TokenShards(folders[0], "train"), mixture(folders[:1], weights=({0: 3},))
    assert mixed.fingerprint == alone.fingerprint
    for step in (0, 7, 500):
        assert np.array_equal(
            Batches(alone, CONTEXT, BATCH, 3).sequences(step), Batches(mixed, CONTEXT, BATCH, 3).sequences(step)
        )
        assert same(whole(Batches(alone, CONTEXT, BATCH, 3), step), whole(Batches(mixed, CONTEXT, BATCH, 3), step))


def test_every_source_has_the_order_that_it_would_have_alone(folders, mixed):
    """A reference of one sequence after another, in plain Python, over phases and epochs' edges."""
    batches = Batches(mixed, CONTEXT, BATCH, seed=5)
    counts = [-(-(source.n_tokens - 1) // CONTEXT) for source in mixed.sources]
    taken = [0, 0, 0]
    for step in range(36):
        assert list(batches.taken(step).values()) == taken
        order = mixed.phases[step >= 10].order
        rows = []
        for g in range(step * BATCH, (step + 1) * BATCH):
            k = int(order[g % len(order)])
            (i,) = sequence_ids(5, taken[k], 1, counts[k]).tolist()
            taken[k] += 1
            tokens = mixed.sources[k].read(i * CONTEXT, min((i + 1) * CONTEXT + 1, mixed.sources[k].n_tokens)).astype(np.int64)
            rows.append(tokens)
        inputs, targets = whole(batches, step)
        for row, tokens in enumerate(rows):
            assert inputs[row, : len(tokens) - 1].tolist() == tokens[:-1].tolist()
            assert targets[row][targets[row] != -100].tolist() == tokens[1:].tolist()
        assert batches.n_targets(step) == int((targets != -100).sum())
    assert max(n / count for n, count in zip(taken, counts, strict=True)) > 1
    assert batches.epochs(36) == [n / count for n, count in zip(taken, counts, strict=True)]


def test_phases_begin_at_their_step(mixed):
    batches = Batches(mixed, CONTEXT, BATCH, seed=0)
    before, at, end = (np.array(list(batches.taken(step).values())) for step in (9, 10, 110))
    assert at[2] == 0 and before.sum() == 9 * BATCH
    assert np.abs((end - at) - 100 * BATCH * np.array([0.2, 0.2, 0.6])).max() < 2


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 3), (2, 2), (4, 3), (12, 1)])
def test_world_and_micro_batch_change_nothing(mixed, world_size, micro_batch_size):
    batches = Batches(mixed, CONTEXT, BATCH, seed=3)
    for step in (0, 9, 10, 10**5):
        parts = [micro for rank in range(world_size) for micro in batches.micro_batches(step, rank, world_size, micro_batch_size)]
        assert same(join(parts), whole(batches, step))


@pytest.mark.parametrize("at", [3, 10, 25])
def test_it_goes_on_from_any_step(mixed, at):
    batches = Batches(mixed, CONTEXT, BATCH, seed=3)
    later = Batches(mixed, CONTEXT, BATCH, 3, at, at * BATCH, batches.taken(at))
    for step in (at, at + 1, at + 30):
        assert np.array_equal(later.sequences(step), batches.sequences(step))
        assert later.taken(step) == batches.taken(step)


def test_left_out_sequences_and_another_batch_size_repeat_and_lose_nothing(mixed):
    """A rollback from step 8 to step 4, then a batch of 20 from step 6 on; phases still begin at step 10."""
    first = Batches(mixed, CONTEXT, BATCH, 3)
    back = Batches(mixed, CONTEXT, BATCH, 3, 4, 8 * BATCH, first.taken(8))
    larger = Batches(mixed, CONTEXT, 20, 3, 6, 10 * BATCH, back.taken(6))
    seen = (
        [first.sequences(s) for s in range(8)] + [back.sequences(s) for s in (4, 5)] + [larger.sequences(s) for s in range(6, 10)]
    )
    assert not larger.taken(10)[mixed.sources[2].fingerprint] and larger.taken(11)[mixed.sources[2].fingerprint]
    ids = np.concatenate(seen)
    code = ids[(ids >= first.numbers.starts[1]) & (ids < first.numbers.starts[2])]
    n = int(first.numbers.counts[1])
    assert len(code) == larger.taken(10)[mixed.sources[1].fingerprint]
    assert len(set(code[:n].tolist())) == min(n, len(code))


def test_other_weights_go_on_where_each_source_was(folders, mixed):
    batches = Batches(mixed, CONTEXT, BATCH, 3)
    other = mixture(folders, weights=({0: 1}, {0: 1}, {0: 1}))
    later = Batches(other, CONTEXT, BATCH, 3, 8, 8 * BATCH, batches.taken(8))
    assert other.fingerprint == mixed.fingerprint
    assert later.taken(8) == batches.taken(8)
    assert np.array(list(later.taken(9).values())).tolist() == [n + 4 for n in batches.taken(8).values()]
    with pytest.raises(DataError, match="of 5 sequences the sources of the mixture gave 0"):
        Batches(mixed, CONTEXT, BATCH, 3, 1, 5)


def test_the_order_of_the_sources_is_no_other_data_set(folders, mixed):
    assert mixture(folders[::-1]).fingerprint == mixed.fingerprint != mixture(folders[:2]).fingerprint
    assert mixed.names == [str(folders[0]), "code", str(folders[2])]


def test_tokens_one_source_after_another(mixed):
    tokens = np.concatenate([source.read(0, source.n_tokens) for source in mixed.sources])
    assert mixed.n_tokens == len(tokens)
    edge = mixed.sources[0].n_tokens
    for start, stop in ((0, 5), (edge - 3, edge + 3), (0, len(tokens)), (7, 7), (edge, len(tokens))):
        assert np.array_equal(mixed.read(start, stop), tokens[start:stop])
    assert mixed.locate(edge)[0].parent == mixed.sources[1].folder
    with pytest.raises(IndexError):
        mixed.read(0, len(tokens) + 1)


@pytest.mark.parametrize(("world_size", "rows"), [(1, 4), (2, 3), (5, 1)])
def test_validation_by_the_first_weights_on_any_number_of_ranks(folders, world_size, rows):
    validation = mixture(folders, "val", ({0: 0.75}, {0: 0.25}, {0: 0.5}))
    counts = np.array([-(-(source.n_tokens - 1) // CONTEXT) for source in validation.sources])
    parts = [
        pair for rank in range(world_size) for pair in validation_batches(validation, CONTEXT, 12, 1, rank, world_size, rows)
    ]
    inputs, targets = join(parts)
    found = {row.numpy().tobytes() for row, target in zip(inputs, targets, strict=True) if (target != -100).any()}
    expected = set()
    for source, count, some in zip(validation.sources, counts, (6, 2, 4), strict=True):
        tokens = source.read(0, source.n_tokens).astype(np.int64)
        for i in np.arange(some) * count // some:
            row = np.full(CONTEXT, source.eot_id, np.int64)
            part = tokens[i * CONTEXT : (i + 1) * CONTEXT][: source.n_tokens - 1 - i * CONTEXT]
            row[: len(part)] = part
            expected.add(row.tobytes())
    assert found == expected and len(expected) == 12


def test_refused(folders, tmp_path, make_texts, write_jsonl):
    options = {"val_fraction": 0.2, "workers": 1, "log": lambda line: None}
    bpe = prepare(
        str(write_jsonl(tmp_path / "t.jsonl", make_texts(60))), tmp_path / "bpe", tokenizer="bpe", vocab_size=280, **options
    )
    with pytest.raises(DataError, match=r"web and .*bpe have different tokenizers \(\w{12} and \w{12}, end of text 256 and 0\)"):
        mixture([folders[0], bpe])
    copy = shutil.copytree(folders[0], tmp_path / "copy")
    with pytest.raises(DataError, match=r"web and .*copy hold the same data: give it once"):
        mixture([folders[0], copy])
    with pytest.raises(DataError, match=r"the weight 1e-05 of .*code is less than 1/10,000 of the mixture"):
        mixture(folders[:2], weights=({0: 1}, {0: 1e-5}))
    with pytest.raises(DataError, match=r"code: \d+ tokens, too few for a sequence of 100000 and its targets"):
        Batches(Mixture([TokenShards(folder, "train") for folder in folders[1:]], ({0: 1}, {0: 1})), 100_000, 2, 0)
    damaged = json.loads((copy / "index.json").read_text())
    damaged["format"] = "token-files"
    (copy / "index.json").write_text(json.dumps(damaged))
    with pytest.raises(DataError, match=r"index.json: damaged"):
        TokenShards(copy, "train")
