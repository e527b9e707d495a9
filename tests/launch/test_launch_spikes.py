"""Spikes of the loss, and what a rollback needs: the monitor continues, a checkpoint must be there, and each may help."""

import json

import pytest
from bad_gradients import Poison
from stopping import StopIn

from launch.monitoring import guard
from launch.run import resume
from launch.run.hooks import Hooks

OPTIONS = ("schedule.kind=constant", "schedule.warmup=0", "eval.every=0", "log.sample_tokens=0", "train.batch_size=1")
ANY = "train.spike=1e-9"  # every loss above the median


@pytest.fixture(autouse=True)
def short_window(monkeypatch):
    monkeypatch.setattr(guard, "SPIKE_WINDOW", 5)


def events(run, kind, folder="run"):
    lines = (run.tmp_path / folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def state(run, step):
    return json.loads((run.tmp_path / "run" / "checkpoints" / f"step_{step:08}" / "state.json").read_text())


def test_a_spike_before_the_first_checkpoint_is_reported_and_the_run_goes_on(run):
    status, _, err = run(*OPTIONS, ANY, "train.on_spike=rollback", "train.steps=16", "checkpoint.every=0")
    problems = events(run, "problem")
    assert status == 0 and not err and problems and not events(run, "rollback")
    assert all(p["problem"].endswith(", and there is no checkpoint to roll back to") for p in problems)


def test_bad_steps_before_the_first_checkpoint_say_that_there_is_none(run):
    status, _, err = run(*OPTIONS, "train.on_spike=rollback", "train.max_bad_steps=2", "checkpoint.every=0", hooks=Poison([2, 3]))
    assert status == 2 and "2 steps in a row were not finite, and there is no checkpoint to roll back to; the last: loss " in err


def test_many_rollbacks_that_help_are_no_reason_to_stop(run, monkeypatch):
    monkeypatch.setattr(resume, "MAX_ROLLBACKS", 3)
    status, _, err = run(*OPTIONS, ANY, "train.on_spike=rollback", "train.steps=60", "checkpoint.every=1")
    rollbacks = events(run, "rollback")
    assert status == 0, err
    assert len(rollbacks) > 4 and state(run, 60)["rollbacks"] == len(rollbacks)


class Always(Hooks):
    """A gradient that is never finite from step 4 on."""

    def after_backward(self, step, strategy, loss):
        Poison([step] if step >= 4 else []).after_backward(step, strategy, loss)


def test_rollbacks_that_do_not_help_end_the_run(run):
    options = [*OPTIONS, "train.on_spike=rollback", "train.max_bad_steps=1", "checkpoint.every=2"]
    status, _, err = run(*options, hooks=Always())
    said = "step 4: 10 rollbacks in a row did not help, the last to step 2: lower optimizer.lr"
    assert status == 2 and said in err and err.count("\n") == 1
    assert len(events(run, "rollback")) == 10 and state(run, 2)["rollbacks_in_a_row"] == 10
    # The count is saved; another start that gets further begins to count anew.
    assert "10 rollbacks in a row did not help" in run(*options, hooks=Always())[2]
    assert run(*options, hooks=Poison([6]))[0] == 0
    assert state(run, 4)["rollbacks_in_a_row"] == 1 and state(run, 4)["rolled_back_to"] == 4


def test_checkpoints_of_skipped_steps_are_no_progress(run):
    """A checkpoint is also written where a step was skipped: each rollback goes to a later one, and none helps."""
    options = [*OPTIONS, "train.on_spike=rollback", "train.max_bad_steps=3", "checkpoint.every=2", "train.steps=200"]
    status, _, err = run(*options, hooks=Always())
    assert status == 2 and "10 rollbacks in a row did not help" in err and len(events(run, "rollback")) == 10


def test_the_monitor_of_spikes_continues(run):
    options = [*OPTIONS, ANY, "train.steps=16", "checkpoint.every=8"]
    run(*options, folder="whole")
    run(*options, folder="parts", hooks=StopIn(9))
    run(*options, folder="parts")
    problems = [[(e["step"], e["problem"]) for e in events(run, "problem", folder)] for folder in ("whole", "parts")]
    assert problems[0] == problems[1] and any(8 < step <= 13 for step, _ in problems[0])
