"""A checkpoint goes through every strategy on 4, 3, 2 and 1 processes, and is the same to the last bit in the end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from configs.schema import Checkpoint, Config, Distributed, Optimizer, Train
from launch.checkpoint.load import load_checkpoint
from launch.checkpoint.save import take_snapshot, write_checkpoint
from launch.checkpoint.tensors import read_tensors
from launch.checkpoint.verify import MODEL, OPTIMIZER, verify
from launch.distributed.setup import make_accelerator, make_strategy
from models import build_model

ROOT = Path(__file__).parents[2]
LAYOUTS = {
    "ddp": {},
    "shard_state": {"shard_state": True},
    "zero1": {"strategy": "zero1"},
    "zero2": {"strategy": "zero2"},
    "zero3": {"strategy": "zero3"},
    "fsdp2": {"strategy": "fsdp2"},
    "hsdp": {"strategy": "fsdp2", "replicas": 2},
}
ONLY = {"shard_state": ("celo2",)}  # the optimizers that a layout takes


def small_model():
    torch.manual_seed(0)
    return build_model(layers=2, width=30, heads=3, context=16, vocab_size=101)


def settings(optimizer: str, layout: str) -> Config:
    distributed = Distributed(**LAYOUTS[layout])
    return Config(optimizer=Optimizer(name=optimizer), distributed=distributed, train=Train(batch_size=12, micro_batch_size=1))


def tensors(checkpoint: Path) -> dict:
    return read_tensors(checkpoint / MODEL) | read_tensors(checkpoint / OPTIMIZER)


@pytest.mark.slow  # 4 starts
@pytest.mark.parametrize("optimizer", ["celo2", "adamw"])
def test_every_layout_hands_every_bit_on(optimizer, tmp_path):
    strategy = make_strategy(settings(optimizer, "ddp"), Accelerator(cpu=True), small_model())
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        for p in strategy.model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        strategy.optimizer.step()
    AcceleratorState._reset_state(reset_partial_state=True)
    path, _ = write_checkpoint(tmp_path / "begin", take_snapshot(strategy, {"step": 1}), Checkpoint())
    expected = tensors(path)
    for world in (4, 3, 2, 1):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", __file__]
        command += [optimizer, str(path), str(tmp_path / str(world))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, done.stdout + done.stderr
        for path in map(Path, json.loads((tmp_path / str(world) / "written.json").read_text())):
            verify(path)
            found = tensors(path)
            assert found.keys() == expected.keys()
            wrong = [
                key for key in found if not torch.equal(found[key], expected[key]) or found[key].dtype != expected[key].dtype
            ]
            assert not wrong, (path, wrong)
            assert (path / MODEL).exists() == (world == 1 or path.parent.name.endswith("one"))


def main(optimizer: str, source: str, out: str) -> None:
    """Load `source` under the first layout and write it, load that under the second, and so on."""
    from launch.private import leave

    path, written = Path(source), []
    for layout in LAYOUTS:
        world = int(os.environ["WORLD_SIZE"])
        if optimizer not in ONLY.get(layout, (optimizer,)) or (layout == "hsdp" and world % 2):
            continue
        config = settings(optimizer, layout)
        accelerator = make_accelerator(config)
        strategy = make_strategy(config, accelerator, small_model())
        for by_all in (False, True):
            load_checkpoint(path, strategy)
            snapshot = take_snapshot(strategy, {"step": 1}, by_all)
            path, _ = write_checkpoint(Path(out) / (layout if by_all else f"{layout}-one"), snapshot, Checkpoint())
            written.append(str(path))
        AcceleratorState._reset_state(reset_partial_state=True)
    if os.environ["RANK"] == "0":
        (Path(out) / "written.json").write_text(json.dumps(written))
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
