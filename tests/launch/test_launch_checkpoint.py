"""Checkpoints on their own: what is in them, and what becomes of a damaged one."""

import json
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from configs.load import ConfigError, build, options
from configs.schema import Checkpoint, Config, Optimizer
from launch.checkpoint import publish
from launch.checkpoint import save as save_module
from launch.checkpoint.load import load_checkpoint
from launch.checkpoint.save import take_snapshot, write_checkpoint
from launch.checkpoint.state import read_state, wrong_kinds
from launch.checkpoint.verify import CheckpointError, find_checkpoint, verify
from launch.distributed.setup import make_strategy
from models import build_model


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """A process has one accelerator; other tests want one of their own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def trained(name: str, steps: int = 2, seed: int = 0, state_dtype: str = "fp32"):
    torch.manual_seed(seed)
    model = build_model(layers=1, width=16, heads=2, context=8, vocab_size=64)
    strategy = make_strategy(Config(optimizer=Optimizer(name=name, state_dtype=state_dtype)), Accelerator(cpu=True), model)
    for _ in range(steps):
        step(strategy)
    return strategy


def save_checkpoint(folder, strategy, state, keep):
    return write_checkpoint(folder, take_snapshot(strategy, state), Checkpoint(keep=keep))[0]


def step(strategy, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for p in strategy.model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    strategy.optimizer.step()


@pytest.mark.parametrize(
    ("name", "state_dtype"),
    [("celo2", "fp32"), ("celo2", "bf16"), ("celo2-base", "fp32"), ("celo2-base", "bf16"), ("adamw", "fp32"), ("muon", "fp32")],
)
def test_everything_comes_back(name, state_dtype, tmp_path):
    strategy = trained(name, state_dtype=state_dtype)
    path = save_checkpoint(tmp_path, strategy, {"step": 2}, keep=1)
    other = trained(name, steps=0, seed=1, state_dtype=state_dtype)
    load_checkpoint(path, other)
    assert read_state(path) == {"step": 2}
    for s in (strategy, other):
        step(s, seed=4)
    for (key, a), b in zip(strategy.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b), key
        for entry, value in strategy.optimizer.state[a].items():
            assert torch.equal(value, other.optimizer.state[b][entry])
            assert value.dtype == other.optimizer.state[b][entry].dtype


@pytest.mark.parametrize(("saved", "here"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_accumulators_keep_their_dtype_whatever_was_saved(saved, here, tmp_path):
    """float32 into bfloat16 rounds to nearest once and counts steps from the start; the other way nothing changes."""
    strategy, other = trained("celo2", state_dtype=saved), trained("celo2", steps=1, seed=1, state_dtype=here)
    load_checkpoint(save_checkpoint(tmp_path, strategy, {"step": 2}, keep=1), other)
    weight = "model.layers.0.attn.q_proj.weight"
    old, new = (s.optimizer.state[dict(s.model.named_parameters())[weight]] for s in (strategy, other))
    assert (old.keys() ^ new.keys()) == {"count"}
    for name in old.keys() & new.keys():
        assert torch.equal(new[name], old[name].to(new[name].dtype)), name
    assert new["momentum"].dtype == (torch.bfloat16 if here == "bf16" else torch.float32)
    assert "count" not in new or new["count"] == 0
    step(other)


def test_names_shapes_and_bytes(tmp_path):
    from safetensors import safe_open

    strategy = trained("celo2")
    path = save_checkpoint(tmp_path, strategy, {"step": 2}, keep=1)
    assert path.name == "step_00000002"
    with safe_open(path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {name for name, _ in strategy.model.named_parameters()}
    weight = "model.layers.0.attn.q_proj.weight"
    with safe_open(path / "optimizer.safetensors", "pt") as file:
        assert file.get_slice(f"{weight}/momentum").get_shape() == [3, 16, 16]
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest) == {"model.safetensors", "optimizer.safetensors", "config.json", "state.json"}
    assert all((path / name).stat().st_size == entry["bytes"] for name, entry in manifest.items())


def test_only_the_newest_are_kept(tmp_path):
    strategy = trained("adamw")
    for number in range(1, 6):
        save_checkpoint(tmp_path, strategy, {"step": number}, keep=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step_00000004", "step_00000005"]
    # Where the folder of an old one takes no changes, as on a disk that is read-only by now, it stays, and stays whole.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", refuse_names("step_00000004", Path.rename))
        save_checkpoint(tmp_path, strategy, {"step": 6}, keep=1)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step_00000004", "step_00000006"]
    verify(tmp_path / "step_00000004")


def refuse_names(name, rename):
    def refusing(path, target):
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    return refusing


DAMAGE = {
    "a file is missing": lambda path: (path / "optimizer.safetensors").unlink(),
    "the manifest is missing": lambda path: (path / "manifest.json").unlink(),
    "a file is cut short": lambda path: truncate(path / "model.safetensors"),
    "a byte is flipped": lambda path: flip(path / "model.safetensors"),
    "the state is changed": lambda path: (path / "state.json").write_text('{"step": 9}'),
    "the manifest is no JSON": lambda path: (path / "manifest.json").write_text("{"),
}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, tmp_path):
    strategy = trained("celo2")
    first = save_checkpoint(tmp_path, strategy, {"step": 1}, keep=2)
    second = save_checkpoint(tmp_path, strategy, {"step": 2}, keep=2)
    assert find_checkpoint(tmp_path) == (second, [])
    DAMAGE[damage](second)
    path, complaints = find_checkpoint(tmp_path)
    assert path == first
    assert len(complaints) == 1
    assert second.name in complaints[0]
    with pytest.raises(CheckpointError, match=second.name):
        verify(second)


def test_a_failed_save_leaves_the_last_checkpoint_and_no_litter(tmp_path, monkeypatch):
    strategy = trained("celo2")
    first = save_checkpoint(tmp_path, strategy, {"step": 1}, keep=1)

    for failing in save_module.PHASES[:-1]:

        def no_space(phase, failing=failing):
            if phase == failing:
                raise OSError(28, "No space left on device")

        with pytest.raises(CheckpointError, match="No space left"):
            write_checkpoint(tmp_path, take_snapshot(strategy, {"step": 2}), Checkpoint(keep=1), no_space)
        assert list(tmp_path.iterdir()) == [first]
    monkeypatch.setattr(publish.shutil, "disk_usage", lambda path: Usage(1 << 20, 1 << 20, 1000))
    with pytest.raises(CheckpointError, match=r"no space left: .* GB needed"):
        save_checkpoint(tmp_path, strategy, {"step": 2}, keep=1)
    assert list(tmp_path.iterdir()) == [first]


def test_no_checkpoint(tmp_path):
    assert find_checkpoint(tmp_path / "nowhere") == (None, [])


def test_every_piece_of_work_is_told(tmp_path):
    """Writing, verifying and loading call `progress` for each tensor or piece of a file, so that a slow disk is no dead rank."""
    strategy, calls = trained("celo2"), []
    snapshot = take_snapshot(strategy, {"step": 2})
    path, _ = write_checkpoint(tmp_path, snapshot, Checkpoint(), progress=lambda: calls.append(0))
    assert len(calls) >= len(snapshot.shares)
    calls.clear()
    verify(path, progress=lambda: calls.append(0))
    assert len(calls) == 4  # small files
    calls.clear()
    load_checkpoint(path, strategy, lambda: calls.append(0))
    assert len(calls) >= len(snapshot.shares)


def test_what_the_schema_accepts_is_read_again(run):
    """However large a number is: the checkpoints of a run that trains with it would be lost."""
    taken = set()
    for name, _, _ in options():
        section, key = name.split(".")
        for value in (sys.float_info.max, 1e20, 10**300, 1 << 62):
            with suppress(ConfigError):
                config = build({section: {key: value}})
                assert not list(wrong_kinds({"config": json.loads(json.dumps(asdict(config)))})), name
                taken.add(name)
    assert {"train.grad_clip", "train.spike", "optimizer.lr", "optimizer.adamw_lr", "checkpoint.keep", "log.every"} <= taken
    assert not list(wrong_kinds({"val_loss": 1e30, "best_loss": 1e30, "window_loss": 1e30}))
    assert list(wrong_kinds({"step": 1 << 63})) == ["step"]

    large = ["train.grad_clip=1e20", "train.spike=1e30", f"checkpoint.keep={10**20}", "eval.every=0", "log.sample_tokens=0"]
    assert run(*large, "train.steps=2")[0] == 0
    status, _, _ = run(*large, "train.steps=3")
    assert status == 0 and "resumed from" in run.out
