"""The verdict on a step stays on the device: nothing waits for it, and the run is the same as where everything is known at once.

On several processes: tests/launch/test_train_distributed.py.
"""

import json
import os
import signal

import pytest
import torch
from bad_gradients import Poison
from host_waits import LAST, HostWaits
from safetensors.torch import load_file

from launch.run.hooks import Hooks

QUIET = ["train.steps=6", "log.every=6", "eval.every=0", "checkpoint.every=0", "train.micro_batch_size=4"]
STATISTICS = "launch/monitoring/step_statistics.py: record"


@pytest.mark.parametrize(
    ("strategy", "name", "reads"),
    [("ddp", "celo2", 1), ("fsdp2", "celo2", 1), ("ddp", "adamw", 1), ("fsdp2", "adamw", 1), ("ddp", "muon", 2)],
)
def test_reads_of_the_device_in_a_step(strategy, name, reads, run):
    """Of the newest step none, where the optimizer asks the device; else one. A logged step reads verdict and statistics."""
    with HostWaits() as waits:
        assert run(f"optimizer.name={name}", f"distributed.strategy={strategy}", *QUIET, hooks=waits)[0] == 0
    of_step = {step: dict(counts) for step, counts in waits.of_step}
    assert [of_step[step] for step in (3, 4, 5)] == [{LAST: reads}] * 3
    assert of_step[2] == ({LAST: reads - 1} if reads > 1 else {})  # the first step is logged, so its verdict was read already
    assert (of_step[6][LAST], of_step[6][STATISTICS]) == (reads + 1, 1)


def weights_of(folder, step):
    checkpoint = folder / "checkpoints" / f"step_{step:08}"
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "optimizer.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def events(folder):
    """What the events say of bad steps."""
    keys = ("event", "step", "problem", "sequences", "sequences_left_out")
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [{key: e[key] for key in keys if key in e} for e in found if e["event"] in ("problem", "rollback")]


# What differs from the usual run, and the events: three steps are skipped; or two, and the second rolls back.
CASES = {
    "celo2, bfloat16 state": (["optimizer.state_dtype=bf16"], 3),
    "adamw": (["optimizer.name=adamw"], 3),
    "roll back": (["train.on_spike=rollback", "train.max_bad_steps=2"], 4),
}


@pytest.mark.parametrize("case", CASES)
def test_a_verdict_that_comes_late_changes_nothing(case, run):
    """Steps 6, 7 and 11 are bad. All known at once, or hardly a step logged: the same bits, and events of the same steps."""
    options, n_events = CASES[case]
    options = [*options, "train.steps=13", "checkpoint.every=5", "checkpoint.keep=9", "eval.every=0", "log.sample_tokens=0"]
    once, late = run.tmp_path / "once", run.tmp_path / "late"
    assert run(*options, "log.every=1", folder="once", hooks=Poison([6, 7, 11]))[0] == 0
    assert run(*options, "log.every=99", folder="late", hooks=Poison([6, 7, 11]))[0] == 0
    assert events(late) == events(once) and len(events(once)) == n_events
    assert [event["step"] for event in events(late)] == ([6, 7, 5, 11] if n_events == 4 else [6, 7, 11])
    for step in (5, 10, 13):
        assert equal(weights_of(late, step), weights_of(once, step))


class SignalIn(Hooks):
    """SIGTERM before step 3."""

    def before_step(self, step, strategy):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_stops_one_step_later_at_most(run):
    options = ["train.steps=9", "log.every=99", "eval.every=0", "checkpoint.every=0", "log.sample_tokens=0"]
    assert run(*options, folder="whole")[0] == 0
    assert run(*options, folder="stopped", hooks=SignalIn())[0] == 75
    assert [path.name for path in (run.tmp_path / "stopped" / "checkpoints").iterdir()] == ["step_00000004"]
    assert run(*options, folder="stopped")[0] == 0
    assert equal(weights_of(run.tmp_path / "stopped", 9), weights_of(run.tmp_path / "whole", 9))
