"""Checkpoints that several ranks wrote, without their processes: files and index, who owns what; and a second folder."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from celo2.distributed.shard import LocalShard
from configs.schema import Checkpoint, Config
from launch.checkpoint import save as save_module
from launch.checkpoint.export import export
from launch.checkpoint.load import load_model, optimizer_bytes
from launch.checkpoint.publish import indexes, write_manifest
from launch.checkpoint.tensors import INDEX, TensorFiles, part_name
from launch.checkpoint.trained import open_trained
from launch.checkpoint.verify import MODEL, OPTIMIZER, CheckpointError, find_checkpoint, sha256, verify
from launch.checkpoint.writer import TensorHeader, TensorWriter
from launch.distributed.gather import choose_owners, number_rounds
from launch.run.branch import checkpoint_folders, fallback_name
from launch.run.hooks import Hooks
from launch.run.initialize import begun, find_source
from launch.sample import main as sample

SHAPES = {"a": (2, 3), "empty": (0, 4), "scalar": (), "b": (5,)}
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def write(path, tensors):
    """The file of `tensors` that a rank writes."""
    writer = TensorWriter(path, [TensorHeader(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()])
    for tensor in tensors.values():
        writer.write(tensor)
    return writer.close()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.uint8, torch.float64]
)
def test_the_writer_writes_what_safetensors_reads(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("launch.checkpoint.writer.PIECE", 7)  # bytes that fit no tensor
    monkeypatch.setattr("launch.checkpoint.writer.FLUSH", 16)
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, shape in SHAPES.items()}
    written = write(tmp_path / "file", tensors)
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == dtype for name in tensors)
    assert written.bytes == (tmp_path / "file").stat().st_size and written.sha256 == sha256(tmp_path / "file")
    assert written.tensors == tuple(tensors)
    assert written.tensor_bytes == sum(t.nbytes for t in tensors.values())


def divide(checkpoint: Path, total: int = 3) -> None:
    """Make a checkpoint one that `total` ranks wrote."""
    for whole in (MODEL, OPTIMIZER):
        tensors = list(load_file(checkpoint / whole).items())
        (checkpoint / whole).unlink()
        written = [write(checkpoint / part_name(whole, n + 1, total), dict(tensors[n::total])) for n in range(total)]
        for name, content in indexes(written).items():
            (checkpoint / name).write_text(content)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)


@pytest.fixture
def divided(run):
    """A run of a small Llama with checkpoints of steps 2 and 4, the last one divided; its undivided tensors; its options."""
    options = ["model.layers=null", "model.width=null", "model.heads=null", "model.context=16", f"model.hf={json.dumps(LLAMA)}"]
    options += ["train.steps=4", "checkpoint.every=2", "eval.every=0", "log.sample_tokens=0"]
    assert run(*options)[0] == 0
    checkpoint = run.tmp_path / "run" / "checkpoints" / "step_00000004"
    tensors = load_file(checkpoint / MODEL) | load_file(checkpoint / OPTIMIZER)
    divide(checkpoint)
    return checkpoint, tensors, options


def test_a_divided_checkpoint_is_read_like_a_whole_one(divided, run):
    checkpoint, tensors, options = divided
    assert find_checkpoint(checkpoint.parent) == (checkpoint, [])
    weights = {name: t for name, t in tensors.items() if "/" not in name}
    for model in (load_model(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint)):  # by transformers alone, too
        own = dict(model.named_parameters())
        assert own.keys() == weights.keys() and all(torch.equal(own[name], weights[name]) for name in own)
    with TensorFiles(checkpoint / OPTIMIZER) as files:
        assert {name: files.get_tensor(name).shape for name in files.keys()} == {  # noqa: SIM118
            name: t.shape for name, t in tensors.items() if "/" in name
        }
    assert optimizer_bytes(checkpoint) == sum(t.nbytes for name, t in tensors.items() if "/" in name)
    assert export(checkpoint, run.tmp_path / "out") == checkpoint
    # Continued, branched from, and begun with: as from the undivided checkpoint.
    more = [*options, "train.steps=6"]
    assert run(*more, "model.dropout=0")[0] == 0 and "resumed from" in run.out
    path = f"checkpoint.resume={checkpoint}"
    assert run(*more, path, folder="branch")[0] == 0
    linked = run.tmp_path / "branch" / "checkpoints" / checkpoint.name
    assert {file.name for file in linked.iterdir()} == {file.name for file in checkpoint.iterdir()}
    status, _, error = run("model.layers=null", "model.width=null", "model.heads=null", f"model.init={checkpoint}", folder="init")
    assert status == 0, error
    assert f"began with the weights of step 4 of {checkpoint}" in run.out


PARTS = [part_name(MODEL, 2, 3), part_name(OPTIMIZER, 3, 3), MODEL + INDEX, OPTIMIZER + INDEX]


def test_a_divided_checkpoint_that_lacks_anything_is_refused(divided, run):
    checkpoint, tensors, options = divided
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    before = checkpoint.with_name("step_00000002")
    for name in PARTS:
        content = (checkpoint / name).read_bytes()
        for damage in (None, content[:-1], bytes([content[0] ^ 1]) + content[1:]):
            (checkpoint / name).unlink()
            if damage is not None:
                (checkpoint / name).write_bytes(damage)
            path, problems = find_checkpoint(checkpoint.parent)
            assert path == before and name in problems[0], problems
            (checkpoint / name).write_bytes(content)
        # A manifest that leaves the file out, with the file and without.
        shorter = {other: entry for other, entry in manifest.items() if other != name}
        (checkpoint / "manifest.json").write_text(json.dumps(shorter))
        for there in (True, False):
            if not there:
                (checkpoint / name).unlink()
            with pytest.raises(CheckpointError, match=f"lacks {name}"):
                verify(checkpoint)
        (checkpoint / name).write_bytes(content)
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    for name in (MODEL, part_name(MODEL, 4, 4)):  # both forms, or parts of two divisions
        (checkpoint / name).write_bytes(b"")
        (checkpoint / "manifest.json").unlink()
        write_manifest(checkpoint)
        with pytest.raises(CheckpointError, match=r"in two forms|lacks"):
            verify(checkpoint)
        (checkpoint / name).unlink()
    # A tensor in two files, each right by its hash: which one counts, nobody can say.
    twice = next(name for name in load_file(checkpoint / part_name(MODEL, 1, 3)))
    second = checkpoint / part_name(MODEL, 2, 3)
    content = load_file(second) | {twice: tensors[twice] + 1}
    second.unlink()
    write(second, content)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)
    with pytest.raises(ValueError, match=f"{second} holds {re.escape(twice)}, which another file beside it holds, too"):
        TensorFiles(checkpoint / MODEL)
    status, _, error = run(*options, "train.steps=6")
    assert status == 2 and error.startswith(f"error: cannot read {checkpoint}: ") and len(error.splitlines()) == 1


def test_owners_are_balanced_and_hold_a_part():
    """Over the ranks of the shard group, and over replicas; buffers and whole weights over all ranks."""
    numbers = (100, 40, 30, 30, 20, 10, 10)
    shards = {}
    for n, size in enumerate(numbers):
        weight = torch.empty(size, device="meta")
        ranges = [(0, size // 2), (size // 2, size)] if n else [(0, size), (size, size)]  # the first lies on one rank alone
        shards[f"p{n}"] = SimpleNamespace(weight=weight, local_shard=LocalShard((size,), 0, 0), ranges=ranges)
    host = SimpleNamespace(rank=0, world=4, divided_over=[[0, 1], [2, 3]])
    strategy = SimpleNamespace(host=host, shards=shards, buffers={"b": torch.empty(3)})
    owners = choose_owners(strategy)
    assert owners["p0"] in (0, 2)
    loads = [sum(size for n, size in enumerate(numbers) if owners[f"p{n}"] == rank) for rank in range(4)]
    assert max(loads) == 100 and sorted(loads)[0] >= 40
    rounds = number_rounds(owners, dict.fromkeys(owners, 1))
    for rank in range(4):
        mine = [rounds[name] for name, owner in owners.items() if owner == rank]
        assert sorted(mine) == list(range(len(mine)))


class Refuse(Hooks):
    """The first `times` attempts to write find no space."""

    def __init__(self, times):
        self.left = times

    def before_save_phase(self, phase):
        if phase == "weights" and self.left:
            self.left -= 1
            raise OSError(28, "No space left on device")


def events(folder, kind="checkpoint"):
    records = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [record for record in records if record["event"] == kind]


def test_the_last_checkpoint_is_tried_again(run, monkeypatch):
    monkeypatch.setattr(save_module, "PAUSE", 0.05)
    options = ["train.steps=4", "checkpoint.every=2", "eval.every=0", "log.sample_tokens=0"]
    assert run(*options, "checkpoint.patience=2", hooks=Refuse(5))[0] == 0
    assert [(e["step"], "error" in e) for e in events(run.tmp_path / "run")] == [(2, True), (4, True), (4, False)]
    (waiting,) = events(run.tmp_path / "run", "waiting")
    assert waiting["step"] == 4 and "No space left" in waiting["error"] and "trying again for 2 s" in waiting["error"]
    assert run.out.count("trying again for 2 s") == 1
    # In vain: status 2, and the checkpoint before is still there.
    status, _, error = run(*options, "train.steps=6", "checkpoint.patience=0.2", hooks=Refuse(math.inf))
    assert status == 2 and error.count("No space left") == 1
    assert "step_00000004" in {path.name for path in (run.tmp_path / "run" / "checkpoints").iterdir()}


def test_a_second_folder_takes_what_the_first_does_not(run):
    """`auto` goes on from the newest of both; what the first folder takes again makes the second one's surplus."""
    options = ["train.steps=6", "checkpoint.every=2", "checkpoint.keep=1", "eval.every=0", "log.sample_tokens=0"]
    options.append("schedule.kind=constant")
    _, whole, _ = run(*options, folder="whole")
    second = run.tmp_path / "second"
    options.append(f"checkpoint.fallback_dir={second}")

    class FullFrom4(Hooks):
        def before_save_phase(self, phase):
            temporary = run.tmp_path / "run" / "checkpoints" / ".step_00000004.tmp"
            if phase == "weights" and temporary.exists():
                raise OSError(28, "No space left on device")

    assert run(*options, "train.steps=4", "log.sample_tokens=2", hooks=FullFrom4())[0] == 0
    assert "a sample of at most 2 tokens" in run.out and "no sample.txt" not in run.out  # of the checkpoint in the second folder
    (last_saved,) = second.glob("run-*/step_*")
    assert last_saved.name == "step_00000004"
    first, last = events(run.tmp_path / "run")
    assert last["folder"].startswith(str(second)) and "No space left" in last["instead"] and "folder" not in first
    # Whoever asks for the run's newest checkpoint gets that one, with what belongs to the run.
    first_folder, out = run.tmp_path / "run", run.tmp_path / "out"
    assert sample([str(first_folder), "--tokens", "1"]) == 0
    assert open_trained(first_folder).path == last_saved and open_trained(first_folder).notes == []
    assert export(first_folder, out) == last_saved
    assert "after step 4" in (out / "README.md").read_text() and "# run" not in (out / "README.md").read_text()
    assert find_source(str(first_folder)).tokenizer_file == first_folder / "tokenizer.json"
    status, _, _ = run(f"model.init={first_folder}", "train.steps=1", "eval.every=0", folder="begun")
    assert status == 0 and f"with the weights of step 4 of {last_saved}" in run.out
    for another in ("null", run.tmp_path / "third"):  # it would be forgotten
        status, _, error = run(*options, f"checkpoint.fallback_dir={another}")
        assert status == 2 and error.count("\n") == 1
        assert f"has its checkpoint of step 4 in {last_saved.parent}: continue with checkpoint.fallback_dir={second}" in error
    # Where the run's folder is mounted or moved to does not matter; a name that leads elsewhere is not followed.
    moved = (run.tmp_path / "run").rename(run.tmp_path / "moved")
    status, records, _ = run(*options, folder="moved")
    assert status == 0 and f"resumed from {second}" in run.out
    assert [r["loss"] for r in records if "loss" in r] == [r["loss"] for r in whole if "loss" in r]
    assert [path.name for path in (moved / "checkpoints").iterdir()] == ["step_00000006"]
    for name in ("../run-0123456789ab", "run", "", "/run", "/a\0/run-0123456789ab", "/a/run-0123456789ab\n/b"):
        (moved / "fallback_folder").write_text(name)
        assert re.fullmatch(r"moved-[0-9a-f]{12}", fallback_name(moved, None, second))
    assert not list(second.glob("run-*/step_*"))


def test_a_run_whose_checkpoints_lie_in_the_second_folder_alone_has_begun(tmp_path):
    """So `model.init` is not looked at again."""
    config, run_dir = Config(checkpoint=Checkpoint(fallback_dir=str(tmp_path / "second"))), tmp_path / "run"
    assert begun(config, run_dir) is None
    checkpoint = checkpoint_folders(config, run_dir, None)[1] / "step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    assert begun(config, run_dir).path == checkpoint and begun(config, run_dir).run == run_dir  # whose rule it goes on with
    assert begun(Config(), run_dir) is None


def test_the_second_folder_belongs_to_one_line_of_one_run(run):
    """Another run with the same second folder, or a line that began at an earlier checkpoint, does not continue from it."""
    options = ["checkpoint.every=2", "eval.every=0", "log.sample_tokens=0", f"checkpoint.fallback_dir={run.tmp_path / 'second'}"]

    class Full(Hooks):
        def before_save_phase(self, phase):
            if phase == "weights" and (run.tmp_path / "run" / "checkpoints" / ".step_00000004.tmp").exists():
                raise OSError(28, "No space left on device")

    assert run(*options, "train.steps=4", hooks=Full())[0] == 0
    (in_second,) = (run.tmp_path / "second").glob("run-*/step_00000004")
    status, records, _ = run(*options, "train.steps=5", f"checkpoint.resume={run.tmp_path / 'run'}", folder="elsewhere")
    assert status == 0 and [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5]  # with the metrics of its run
    assert run(*options, "train.steps=2", folder="other")[0] == 0
    back = f"checkpoint.resume={run.tmp_path / 'run' / 'checkpoints' / 'step_00000002'}"
    assert run(*options, "train.steps=3", back)[0] == 0
    aside = run.tmp_path / "run" / "set_aside" / "1"  # what lies in the second folder alone is no less kept
    assert open_trained(aside).path == in_second and '"step": 4' in (aside / "metrics.jsonl").read_text()
    assert run(*options, "train.steps=3")[0] == 0
    assert "step_00000003" in run.out and "step_00000004" not in run.out
    status, records, _ = run(*options, "train.steps=5", f"checkpoint.resume={in_second}")  # back to the line that was set aside
    assert status == 0 and [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5]
