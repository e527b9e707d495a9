"""What is said where the ranks differ, and what is compared. With two processes: test_train_distributed.py."""

from types import SimpleNamespace

import pytest
import torch

from configs.schema import Config, Train
from launch.checkpoint import verify
from launch.checkpoint.publish import write_manifest
from launch.checkpoint.verify import FILES, MANIFEST, sha256
from launch.distributed import first_rank
from launch.distributed.heartbeat import Heartbeat
from launch.monitoring.guard import SAME_NORM, Guard
from launch.monitoring.trackers import flat
from launch.run import ranks, weights
from launch.run.branch import Start
from launch.run.ranks import Fact, checkpoint_fact, code_hash, first_difference, in_words
from launch.run.resume import find_start
from launch.run.weights import hashes, weights_fact


def facts(**values):
    return [Fact(name, value, f"mend {name}") for name, value in values.items()]


def test_the_first_difference_is_named_with_its_ranks_and_the_number_of_others():
    hosts = [f"node{rank // 8}" for rank in range(32)]
    same = [facts(lr="0.1", seed="1")] * 32
    assert first_difference(hosts, same) is None
    other = [*same[:8], *[facts(lr="0.2", seed="1")] * 8, *same[16:]]
    first, second = "0.1 on ranks 0-7, 16-31 (node0, node2, node3)", "0.2 on ranks 8-15 (node1)"
    assert first_difference(hosts, other) == f"the ranks differ: lr is {first}, {second}; mend lr"
    # One fact that a rank lacks, and another that it has alone, as with another version of this project.
    lacks = [facts(lr="0.1", seed="1"), facts(lr="0.1", rule="a")]
    line = "the ranks differ: seed is 1 on rank 0 (a), not given on rank 1 (b) (and 1 more: rule); mend seed"
    assert first_difference(["a", "b"], lacks) == line
    # As many values as ranks, with ends of lines: still one short line.
    every = [facts(lr=f"{rank}\n") for rank in range(32)]
    line = first_difference(hosts, every)
    assert "0 on rank 0 (node0)" in line and "3 on rank 3 (node0) and 28 more; mend lr" in line and "\n" not in line
    assert in_words(list(range(0, 32, 2)), hosts) == "ranks 0, 2, 4, 6 and 12 more (node0, node1, node2, node3)"


def test_every_option_but_the_paths_is_compared(prepared):
    config = Config()
    shards = SimpleNamespace(fingerprint="0123456789abcdef")
    found = {fact.name for fact in ranks.facts_of(config, config, shards, None, prepared)}
    options = set(flat({section: vars(options) for section, options in vars(config).items()}))
    paths = {"run.dir", "data.dir", "data.mix", "data.cache_dir", "optimizer.rule", "checkpoint.fallback_dir"}
    paths.add("eval.lm_eval_include")  # the first rank alone reads it
    assert options - found == paths  # of model.init it is compared whether one is given
    assert {"the rule of the optimizer", "the data set of data.dir", "Python", "torch", "transformers"} <= found
    assert "the code of this project" in found


def test_a_change_of_weights_or_code_is_seen(tmp_path, monkeypatch):
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(bytes(range(200)))
    monkeypatch.setattr(weights, "BLOCK", 64)
    before = weights_fact(hashes(files))
    assert weights_fact([block for part in range(3) for block in hashes(files, part, 3)]) == before  # three ranks of a host
    files[1].write_bytes(bytes(range(199)) + b"?")
    assert weights_fact(hashes(files)) != before
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text("")
    monkeypatch.setattr(ranks, "models", SimpleNamespace(__file__=str(tmp_path / "own" / "__init__.py")))
    code = code_hash()
    (tmp_path / "own" / "__init__.py").write_text("STEPS = 1\n")
    assert code_hash() != code


def test_a_checkpoint_is_known_by_its_manifest_and_the_sizes_of_its_files(tmp_path):
    path = tmp_path / "run" / "checkpoints" / "step_00000004"
    assert checkpoint_fact(None, tmp_path / "run").value == "none"
    assert checkpoint_fact(path, tmp_path).value == f"unusable ({path} is not a whole checkpoint: {MANIFEST} is missing)"
    path.mkdir(parents=True)
    (path / "state.json").write_text("{}")
    (path / MANIFEST).write_text('{"state.json": {"bytes": 2, "sha256": "is not read"}}')
    whole = checkpoint_fact(path, tmp_path).value
    assert whole.startswith("step 4 with the manifest ")
    (path / "state.json").write_text("{ }")
    assert "has 3 bytes, its manifest says 2" in checkpoint_fact(path, tmp_path).value
    (path / "state.json").write_text("{}")
    (path / MANIFEST).write_text('{"state.json": {"bytes": 2, "sha256": "another"}}')
    assert checkpoint_fact(path, tmp_path).value not in (whole, "none")
    # Where the first rank begins anew.
    assert checkpoint_fact(None, tmp_path / "run").value == f"step 4 in {tmp_path / 'run'}"


@pytest.mark.parametrize("first", [True, False])
def test_the_first_rank_alone_hashes_a_checkpoint(first, tmp_path, monkeypatch):
    """Every rank read all of it at every start. What the first one finds is told to the others."""
    path = tmp_path / "checkpoints" / "step_00000004"
    path.mkdir(parents=True)
    for name in FILES:
        (path / name).write_text('{"step": 4}')
    write_manifest(path)
    hashed, told = [], [Start(path, [], None, False, []), 0, "checkpoints"]
    monkeypatch.setattr(verify, "sha256", lambda file, progress: hashed.append(file.name) or sha256(file))
    monkeypatch.setattr(first_rank.dist, "broadcast_object_list", lambda outcome, src: outcome.__setitem__(0, outcome[0] or told))
    accelerator = SimpleNamespace(is_main_process=first, num_processes=2)
    start = find_start(Config(), tmp_path, accelerator, Heartbeat(0, 1, 60))
    assert start.checkpoint == path and checkpoint_fact(path, tmp_path).value.startswith("step 4 with the manifest ")
    assert sorted(hashed) == (sorted(FILES) if first else [])


@pytest.mark.parametrize(("of_rank_1", "healthy"), [(1.0, True), (1 + SAME_NORM, True), (1 + 3 * SAME_NORM, False), (1e9, False)])
def test_a_gradient_norm_that_is_anothers_is_no_step(of_rank_1, healthy, monkeypatch):
    """Two ranks in one process: what rank 0 sends comes back with rank 1's added."""
    norm = torch.tensor(of_rank_1)
    added = [torch.tensor(0.5), norm, norm.double().square(), torch.tensor(0.0), torch.tensor(0.0)]
    device = SimpleNamespace(device=torch.device("cpu"), num_processes=2)
    device.reduce = lambda mine, _: mine + torch.stack([value.double() for value in added])
    monkeypatch.setattr("launch.monitoring.guard.gather_objects", lambda mine, _: [mine, (0.5, of_rank_1)])
    monkeypatch.setattr("launch.monitoring.guard.dist", SimpleNamespace(group=SimpleNamespace(WORLD=None)))
    guard = Guard(device, Train())
    judged = guard.judge(1, torch.tensor(0.5), torch.tensor(1.0), save=False)
    assert judged.found_inf.item() == float(not healthy) and judged.refused is not healthy
    guard.wait(newest=True)
    (verdict,) = guard.verdicts()
    assert verdict.healthy is healthy and verdict.loss == 1.0
    assert verdict.grad_norm == (1.0 + norm.double().item()) / 2
    assert ("the ranks differ: 1 on rank 0, " in verdict.problem) is not healthy
