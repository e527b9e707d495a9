"""Checkpoints of several ranks, as threads: any pieces become whole tensors, each written by its owner; and a rank that fails."""

import itertools
import json
import random
import weakref

import pytest
import torch
from safetensors.torch import load_file
from thread_ranks import hosts, on_all, strategy_of

from configs.schema import Checkpoint
from launch.checkpoint.save import PHASES, RANK_PHASES, unshared, write_checkpoint
from launch.checkpoint.snapshot import take_snapshot
from launch.checkpoint.tensors import TensorFiles
from launch.checkpoint.verify import MODEL, OPTIMIZER, CheckpointError, find_checkpoint, verify
from launch.distributed import gather

SHAPES = {"embedding": (11, 6), "experts": (4, 6, 5), "matrix": (7, 5), "bias": (7,), "one": (1,)}


@pytest.fixture(autouse=True)
def groups_are_lists(monkeypatch):
    monkeypatch.setattr(gather.dist, "get_process_group_ranks", lambda group: group)


@pytest.fixture(scope="module")
def content():
    """Whole weights, and state of several dtypes with and without leading axes."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    states = {}
    for name, shape in SHAPES.items():
        states[name] = {
            "momentum": torch.randn(3, *shape, generator=generator).bfloat16(),
            "second_moment": torch.rand(shape, generator=generator),
            "count": torch.tensor(7, dtype=torch.int32),
        }
        if len(shape) > 1:
            states[name]["row"] = torch.randn(3, *shape[:-2], shape[-2], generator=generator)
            states[name]["col"] = torch.randn(3, *shape[:-2], shape[-1], generator=generator)
    return weights, states


def cut(world, seed):
    """Contiguous pieces of every parameter, cut anywhere as by ZeRO; ranks may hold nothing."""
    generator = random.Random(seed)
    ranges = {}
    for name, shape in SHAPES.items():
        size = torch.Size(shape).numel()
        at = [0, *sorted(generator.choice([0, size, generator.randint(0, size)]) for _ in range(world - 1)), size]
        ranges[name] = list(itertools.pairwise(at))
    return ranges


def save(all_hosts, folder, step, content, ranges, keepers=None, by_all=True, announce=lambda host, phase: None):
    def action(host):
        strategy = strategy_of(host, *content, ranges, keepers)
        snapshot = take_snapshot(strategy, {"step": step}, by_all)
        return write_checkpoint(folder, snapshot, Checkpoint(keep=2), lambda phase: announce(host, phase))

    return on_all(all_hosts, action)


def require_whole(path, content):
    weights, states = content
    verify(path)
    with TensorFiles(path / MODEL) as model, TensorFiles(path / OPTIMIZER) as optimizer:
        assert set(model.keys()) == {*weights, "buffer"}
        assert torch.equal(model.get_tensor("buffer"), torch.arange(5))
        assert set(optimizer.keys()) == {f"{name}/{key}" for name, state in states.items() for key in state}
        for name, weight in weights.items():
            assert torch.equal(model.get_tensor(name), weight), name
            for key, value in states[name].items():
                found = optimizer.get_tensor(f"{name}/{key}")
                assert torch.equal(found, value) and found.dtype == value.dtype, (name, key)


@pytest.mark.parametrize("groups", [[[0, 1]], [[0, 1, 2]], [[0, 1], [2, 3]], [[0, 1, 2, 3, 4]]], ids=["2", "3", "2x2", "5"])
@pytest.mark.parametrize("by_all", [True, False])
def test_pieces_cut_anywhere_become_whole_tensors(groups, by_all, content, tmp_path):
    for seed in range(6):
        all_hosts, ranges = hosts(groups), cut(len(groups[0]), seed)
        outcomes = save(all_hosts, tmp_path, seed, content, ranges, by_all=by_all)
        assert all(outcome == outcomes[0] for outcome in outcomes), outcomes
        path, size = outcomes[0]
        require_whole(path, content)
        assert size == sum(file.stat().st_size for file in path.iterdir() if file.name != "manifest.json")
        assert by_all or {file.name for file in path.glob("*.safetensors*")} == {MODEL, OPTIMIZER}


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("by_all", [True, False])
def test_replicas_write_each_a_part(divided, by_all, content, tmp_path):
    """State that one replica alone keeps is written by it; only where the first rank writes all does anything travel."""
    all_hosts = hosts([[rank] for rank in range(3)])
    keepers = {name: n % 3 for n, name in enumerate(SHAPES)} if divided else None
    path, _ = save(all_hosts, tmp_path, 1, content, {}, keepers, by_all)[0]
    require_whole(path, content)
    assert any(host.sent for host in all_hosts) == (divided and not by_all)
    names = sorted(file.name for file in path.glob("model*.safetensors"))
    assert names == ([f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)] if by_all else [MODEL])
    if by_all and divided:
        for rank in range(3):
            held = load_file(path / f"optimizer-0000{rank + 1}-of-00003.safetensors")
            assert {name.partition("/")[0] for name in held} == {name for name, keeper in keepers.items() if keeper == rank}


def test_a_rank_that_fails_fails_the_save_on_all_ranks_and_nothing_else(content, tmp_path):
    """In each phase, on any rank and on all: the checkpoint before stays, no litter, and the next save is whole."""
    all_hosts, ranges = hosts([[0, 1, 2]]), cut(3, 1)
    before, _ = save(all_hosts, tmp_path, 1, content, ranges)[0]
    for phase in PHASES[:-1]:
        for failing in ({0}, {2}, {0, 1, 2}) if phase in RANK_PHASES else ({0},):

            def announce(host, reached, phase=phase, failing=failing):
                if reached == phase and host.rank in failing:
                    raise OSError(28, "No space left on device") if failing != {2} else ValueError("something else")

            errors = save(all_hosts, tmp_path, 2, content, ranges, announce=announce)
            assert all(isinstance(error, CheckpointError) for error in errors), errors
            assert len({str(error) for error in errors}) == 1
            expected = "No space left" if failing != {2} else "rank 2"
            assert "cannot write checkpoint" in str(errors[0]) and expected in str(errors[0])
            assert list(tmp_path.iterdir()) == [before] and find_checkpoint(tmp_path) == (before, [])
    path, _ = save(all_hosts, tmp_path, 2, content, ranges)[2]
    require_whole(path, content)


def test_files_are_balanced(tmp_path):
    weights = {f"w{n}": torch.randn(8, size) for n, size in enumerate((64, 40, 33, 32, 31, 30, 20, 8, 8, 8))}
    states = {name: {"momentum": torch.randn(3, *weight.shape)} for name, weight in weights.items()}
    ranges = {name: [(n * w.numel() // 4, (n + 1) * w.numel() // 4) for n in range(4)] for name, w in weights.items()}
    path, _ = save(hosts([[0, 1, 2, 3]]), tmp_path, 1, (weights, states), ranges)[0]
    for kind in ("model", "optimizer"):
        sizes = [file.stat().st_size for file in path.glob(f"{kind}-*.safetensors")]
        assert len(sizes) == 4 and max(sizes) < 1.25 * sum(sizes) / 4, sizes
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights.values()) + 40


def test_a_folder_that_a_rank_does_not_see(tmp_path, monkeypatch):
    folders = [tmp_path / "own", tmp_path / "second"]
    assert on_all(hosts([[0, 1]]), lambda host: unshared(folders, host)) == [None, None]
    (tmp_path / "link").symlink_to(folders[0])
    own_paths = lambda host: unshared([tmp_path / ("own", "link")[host.rank]], host)  # noqa: E731
    assert on_all(hosts([[0, 1]]), own_paths) == [None, None]
    elsewhere = lambda host: unshared([tmp_path / str(host.rank)], host)  # noqa: E731
    assert on_all(hosts([[0, 1]]), elsewhere) == [str(tmp_path / "1")] * 2
    monkeypatch.setattr("launch.checkpoint.save.os.access", lambda path, mode: path != tmp_path / "link")  # mounted to be read
    assert on_all(hosts([[0, 1]]), own_paths) == [str(tmp_path / "link")] * 2
    assert not list(tmp_path.glob("*/.shared*"))


def test_a_tensor_is_gone_before_the_next_is_brought_together(monkeypatch):
    """A rank holds its own shards and one whole tensor, also where it owns several in a row."""
    alive = []

    class Gathering:
        def __init__(self, share, host, tag):
            alive.append([reference() is not None for reference in made].count(True))
            self.whole = torch.empty(3)
            made.append(weakref.ref(self.whole))

        def wait(self):
            return self.whole

    made = []
    monkeypatch.setattr(gather, "Gathering", Gathering)
    shares = [gather.whole_share(name, (0, 0, 0, n), 0, torch.zeros(3)) for n, name in enumerate("abc")]
    for whole in gather.gather_in_turn(shares, None):
        assert whole.numel() == 3
        del whole
    assert alive == [0, 0, 0]
