"""Each example runs as its docstring says; interrupted and continued, it gives the bits of a run that was not interrupted."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LOSS = re.compile(r"(?<!_)loss'?:? '?(\d+\.\d+)")
FOUR_STEPS = ("--steps", "4", "--save-every", "2")
NOT_COMPARED = ("trainer_state.json", "training_args.bin")


def run(script: str, folder: Path, *options: str, processes: int = 0) -> list[float]:
    """The losses that an example prints, one for each step; with `processes` it is started by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, str(EXAMPLES / script), str(folder), *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(loss) for loss in LOSS.findall(done.stdout)]


def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The tensors and numbers in nested dictionaries and lists."""
    if isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{name}/{key}")
    elif isinstance(value, (torch.Tensor, int, float)):
        yield name, value


def contents(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint, a file or a folder, holds: weights, optimizer, schedule."""
    found: dict[str, Any] = {}
    for path in sorted(checkpoint.rglob("*")) if checkpoint.is_dir() else [checkpoint]:
        name = path.name
        if name == ".metadata":  # of torch's distributed checkpoints
            whole = checkpoint.parent / "whole.pt"
            dcp_to_torch_save(path.parent, whole)
            found |= leaves(torch.load(whole, weights_only=False), path.parent.name)
        elif path.suffix == ".safetensors":
            found |= load_file(path)
        elif path.suffix in (".pt", ".bin", ".ckpt") and name not in NOT_COMPARED:
            found |= leaves(torch.load(path, weights_only=False), name)
    return found


class Example(NamedTuple):
    """How to run four steps with checkpoints after two and four, where the last is, and how to go back besides removing it."""

    options: tuple[str, ...]
    last: str
    processes: int = 0
    go_back: Callable[[Path], object] = lambda folder: None


CASES = {
    "plain.py": Example(FOUR_STEPS, "step_000004.pt"),
    "trainer.py": Example(FOUR_STEPS, "checkpoint-4"),
    "lightning_module.py": Example(
        ("--epochs", "2", "--epoch-steps", "2"),
        "epoch=1-step=4.ckpt",
        go_back=lambda folder: shutil.copy(folder / "epoch=0-step=2.ckpt", folder / "last.ckpt"),
    ),
    "accelerate_loop.py": Example(FOUR_STEPS, "step_000004", processes=2),
    "fsdp2.py": Example(FOUR_STEPS, "step_000004", processes=2),
    **{
        f"deepspeed_zero.py --stage {stage}": Example(
            ("--stage", str(stage), *FOUR_STEPS),
            "step_000004",
            processes=2,
            go_back=lambda folder: (folder / "latest").write_text("step_000002"),
        )
        for stage in (1, 2, 3)
    },
}
FAST = ("plain.py", "trainer.py")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_continues_exactly(name, tmp_path):
    """From the first checkpoint as if the run had been killed after it: the same losses, weights and state, bit for bit."""
    if name == "lightning_module.py":
        pytest.importorskip("lightning")
    script, example = name.split()[0], CASES[name]
    straight = run(script, tmp_path, *example.options, processes=example.processes)
    assert len(straight) == 4
    last = tmp_path / example.last
    expected = contents(last)
    assert any("momentum" in key for key in expected)
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    example.go_back(tmp_path)
    continued = run(script, tmp_path, *example.options, processes=example.processes)
    assert continued == straight[2:]
    found = contents(last)
    assert found.keys() == expected.keys()
    assert not [key for key, value in expected.items() if not torch.equal(torch.as_tensor(value), torch.as_tensor(found[key]))]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "processes"), [("fsdp2.py", 1), ("fsdp2.py", 4)])
def test_continues_on_another_number_of_processes(script, processes, tmp_path):
    straight = run(script, tmp_path, *FOUR_STEPS, processes=2)
    shutil.rmtree(tmp_path / "step_000004")
    continued = run(script, tmp_path, *FOUR_STEPS, processes=processes)
    assert continued == pytest.approx(straight[2:], abs=1.1e-4)  # they are printed with four digits


def test_examples_are_short_and_run_by_these_tests():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == {"common.py", *(name.split()[0] for name in CASES)}
    assert not [name for name in scripts if len((EXAMPLES / name).read_text().splitlines()) > 60]
