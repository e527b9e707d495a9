"""Two processes over gloo, started by torchrun: the same run as with one, other layouts on resume, signals agreed on.

Starting processes is what costs, so one start takes several runs (`RUNS`, carried out by this file as a script).
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = ["train.steps=12", "train.micro_batch_size=4", "checkpoint.every=4", "checkpoint.keep=10"]


def losses(records):
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def validation(records):
    return {r["step"]: r["val_loss"] for r in records if "val_loss" in r}


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes(run, prepared):
    _, single, _ = run(*STEPS, folder="one")
    common = [str(run.tmp_path / "config.yaml"), f"data.dir={prepared}", *STEPS]
    one = run.tmp_path / "one" / "checkpoints" / "step_00000004"
    runs = [
        [*common, f"run.dir={run.tmp_path / 'two'}"],
        [*common, f"run.dir={run.tmp_path / 'from_one'}", f"checkpoint.resume={one}"],
        ["signal in step 6 of rank 1", *common, f"run.dir={run.tmp_path / 'signal'}"],
        [*common, f"run.dir={run.tmp_path / 'signal'}"],
        [*common, f"run.dir={run.tmp_path / 'bad'}", "train.batch_size=6"],
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RUNS": json.dumps(runs), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    statuses = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    assert statuses == [f"rank {rank}: [0, 0, 75, 0, 2]" for rank in (0, 1)]

    # Worst measured 0: one process with two micro-batches adds the same numbers in the same order.
    double = read(run.tmp_path / "two")
    assert losses(double) == pytest.approx(losses(single), rel=1e-5)
    assert validation(double) == pytest.approx(validation(single), rel=1e-5)
    # Saved by one, resumed by two; saved by two, resumed by one.
    later = {step: loss for step, loss in losses(single).items() if step > 4}
    assert losses(read(run.tmp_path / "from_one")) == pytest.approx(later, rel=1e-4)
    two = run.tmp_path / "two" / "checkpoints" / "step_00000008"
    _, back, _ = run(*STEPS, f"checkpoint.resume={two}", folder="from_two")
    assert losses(back) == pytest.approx({step: loss for step, loss in later.items() if step > 8}, rel=1e-4)
    # A signal that only the second rank got: both saved after that step, and the continued run is the same.
    assert losses(read(run.tmp_path / "signal")) == losses(double)
    assert "is not a multiple of world_size 2 times micro_batch_size 4" in done.stderr


def main():
    """Carry out RUNS in this process of torchrun and print the exit statuses."""
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    import train

    dist.destroy_process_group = lambda *_: None  # the runs of one start share the group: a new one would meet stale addresses
    real, rank, statuses = train.dropout_seed, int(os.environ["RANK"]), []
    for arguments in json.loads(os.environ["RUNS"]):
        train.dropout_seed = real
        if arguments[0].startswith("signal"):
            arguments.pop(0)

            def signalled(seed, step, rank):
                if (step, rank) == (5, 1):
                    os.kill(os.getpid(), signal.SIGTERM)
                return real(seed, step, rank)

            train.dropout_seed = signalled
        statuses.append(train.main(arguments))
        AcceleratorState._reset_state(reset_partial_state=True)
    print(f"rank {rank}: {statuses}", flush=True)


if __name__ == "__main__":
    main()
