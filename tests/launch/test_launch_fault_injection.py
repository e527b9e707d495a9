"""Fault injection: the command that users run, with fewer kills; and what a resumed run may and may not change."""

import json
import os
import signal
import threading
import time

import pytest
import torch
from bad_gradients import Poison
from forked_runs import Launched, torture
from safetensors.torch import load_file

from launch import fault_injection
from launch.monitoring import guard as guard_module
from launch.monitoring.signals import STOP_SIGNALS, STOPPED
from launch.run.hooks import Hooks


def losses(records):
    return [r["loss"] for r in records if "loss" in r]


def events(run, kind):
    lines = (run.tmp_path / "run" / "events.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == kind]


def injected_and_survived(folder, *arguments):
    """The last line of the table that `python -m launch.torture` prints, and all of it."""
    launched = Launched(1, folder, torture, ["--dir", str(folder / "work"), *arguments])
    status, printed = launched.wait(), launched.text("out")
    assert status == 0, printed + launched.text("err")
    assert not list((folder / "work").iterdir())
    return *map(int, printed.splitlines()[-1].split()[-2:]), printed


def test_kills_and_signals_are_survived(tmp_path):
    assert injected_and_survived(tmp_path, "--kills=4", "--faults", "kills", "signals")[:2] == (8, 8)


@pytest.mark.parametrize("mistake", ["--kills=-1", "--ranks=0", "--seed=-1", "--dir=/dev/null/x", "--faults=rust"])
def test_a_mistake_is_one_line(mistake, capsys):
    with pytest.raises(SystemExit, match="2"):
        fault_injection.main([mistake])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("python -m launch.torture: error: ") and mistake.partition("=")[0] in last


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, ["distributed.strategy=ddp"]),
        (2, ["distributed.strategy=ddp"]),
        (2, ["distributed.strategy=zero1"]),
        (2, ["distributed.strategy=zero3"]),
        (4, ["distributed.strategy=zero3"]),
        (4, ["distributed.strategy=fsdp2", "distributed.replicas=2"]),
    ],
)
def test_every_fault_is_survived(ranks, options, tmp_path):
    """Kills of one rank and of all, at random moments and in each phase of a save; damage, signals, full disks, NaN."""
    injected, survived, printed = injected_and_survived(tmp_path, "--kills=32", f"--ranks={ranks}", *options)
    assert injected == survived
    disks = (3 if "room made" in printed else 1) + (3 if "read-only" in printed else 1)  # where mounting and chattr are permitted
    damaged = 3 * (5 if ranks == 1 else 3 + 2 * (ranks + 1))  # every file
    assert injected == 32 + damaged + 4 + disks + 2


FAST = [("celo2", "fp32"), ("celo2", "bf16"), ("celo2-base", "bf16"), ("adamw", "fp32"), ("muon", "bf16")]
SLOW = [("celo2-base", "fp32"), ("adamw", "bf16"), ("muon", "fp32")]


@pytest.mark.parametrize(("optimizer", "precision"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_two_resumes_across_an_epoch_are_exact(run, optimizer, precision):
    """Stopped by signals at steps 5 and 20 of 50, with an epoch's edge between: bit for bit, and no line more or less."""
    options = [f"optimizer.name={optimizer}", f"train.precision={precision}", "model.dropout=0.1", "train.steps=50"]
    options += ["train.batch_size=16", "eval.every=5", "checkpoint.every=7"]
    _, whole, _ = run(*options, folder="whole")
    for step in (5, 20):
        assert run(*options, hooks=SignalInStep(step))[0] == STOPPED
    status, parts, _ = run(*options)
    assert status == 0
    clock = ("seconds", "tokens_per_second", "optimizer_seconds")
    assert [drop(r, clock) for r in parts] == [drop(r, clock) for r in whole]


def drop(record, keys):
    return {key: value for key, value in record.items() if key not in keys}


class SignalInStep(Hooks):
    """This process gets a signal, or more of them, in step `step`."""

    def __init__(self, step, number=signal.SIGTERM, times=1):
        self.step, self.number, self.times = step, number, times

    def before_step(self, step, strategy):
        if step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def test_handlers_are_put_back(run):
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    run("train.steps=2")
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_second_interrupt_stops_at_once_and_harms_nothing(run):
    options = ["train.steps=12", "checkpoint.every=4"]
    _, whole, _ = run(*options, folder="whole")
    assert run(*options, hooks=SignalInStep(7, signal.SIGINT, times=2))[0] == 130
    status, parts, _ = run(*options)
    assert status == 0
    assert losses(parts) == losses(whole)


def test_changed_learning_rate_and_steps_are_allowed_and_said(run):
    run("train.steps=3")
    status, _, _ = run("train.steps=5", "optimizer.lr=1e-3")
    assert status == 0
    assert "train.steps 3 -> 5" in run.out
    assert "optimizer.lr 0.005 -> 0.001" in run.out


def test_a_bad_step_never_reaches_the_weights(run):
    status, records, _ = run("checkpoint.every=1", "checkpoint.keep=10", hooks=Poison([4]))
    assert status == 0
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "grad_norm" in r and r["grad_norm"] is None] == [4]
    folder = run.tmp_path / "run" / "checkpoints"
    three, four, five = (load_file(folder / f"step_0000000{n}" / "model.safetensors") for n in (3, 4, 5))
    assert all(torch.equal(three[name], four[name]) for name in three)
    assert not all(torch.equal(four[name], five[name]) for name in four)
    (problem,) = events(run, "problem")
    assert problem["step"] == 4
    assert len(problem["sequences"]) == 8
    assert json.loads((folder / "step_00000006" / "state.json").read_text())["bad_steps"] == 1


def test_too_many_bad_steps_stop_the_run_with_the_last_good_checkpoint(run):
    status, _, err = run("train.steps=30", "train.max_bad_steps=4", "checkpoint.every=2", hooks=Poison(range(3, 100)))
    assert status == 2
    assert "4 steps in a row were not finite" in err
    (stopped,) = events(run, "stopped")
    assert stopped["reason"] == "diverged" and "4 steps in a row were not finite" in stopped["error"]
    status, records, _ = run("train.steps=30", "train.max_bad_steps=4", "checkpoint.every=2")
    assert status == 0
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses(records)[-5:])


def test_rollback_goes_back_and_leaves_the_batches_out(run):
    options = ["train.steps=14", "train.max_bad_steps=2", "train.on_spike=rollback", "checkpoint.every=4", "eval.every=0"]
    status, records, _ = run(*options, hooks=Poison([9, 10]))
    assert status == 0
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 15))
    assert all(r["loss"] is not None and r["grad_norm"] is not None for r in records if "loss" in r)
    newest = sorted((run.tmp_path / "run" / "checkpoints").iterdir())[-1]
    state = json.loads((newest / "state.json").read_text())
    assert (state["sequences"], state["rollbacks"], state["bad_steps"]) == ((14 + 2) * 8, 1, 2)
    assert "rolled back to step 8; the 16 sequences since then are left out" in run.out
    # The same steps on the batches that are left: what a run that never saw the bad ones does.
    _, again, _ = run(*options, folder="again")
    assert losses(again)[:8] == losses(records)[:8]
    assert losses(again)[8] != losses(records)[8]


def test_a_spike_is_noticed(run, monkeypatch):
    monkeypatch.setattr(guard_module, "SPIKE_WINDOW", 5)

    class Spike(Hooks):
        def after_backward(self, step, strategy, loss):
            if step == 8:
                loss += 3

    status, _, _ = run("train.steps=10", hooks=Spike())
    assert status == 0
    assert [(e["step"], "spike" in e["problem"]) for e in events(run, "problem")] == [(8, True)]


def test_checkpoints_by_the_clock(run):
    status, _, _ = run("checkpoint.every=0", "checkpoint.minutes=1e-9", "checkpoint.keep=10", "eval.every=0")
    assert status == 0
    saved = [e["step"] for e in events(run, "checkpoint")]
    assert len(saved) >= 3
    assert saved[-1] == 6
    assert all(e["stall_seconds"] >= 0 and e["bytes"] > 0 and e["write_seconds"] > 0 for e in events(run, "checkpoint"))


def test_training_goes_on_while_a_checkpoint_is_written(run):
    class Order(Hooks):
        """What happened, in order: writing begins and goes on, and steps of the main thread."""

        def __init__(self):
            self.order = []

        def before_save_phase(self, phase):
            if phase == "weights":
                self.order.append("writing")
                time.sleep(0.5)
                self.order.append("written")

        def before_step(self, step, strategy):
            self.order.append(threading.current_thread().name == "MainThread")

    hooks = Order()
    assert run("train.steps=6", "checkpoint.every=3", "eval.every=0", hooks=hooks)[0] == 0
    first_save = hooks.order[hooks.order.index("writing") : hooks.order.index("written")]
    assert first_save.count(True) >= 1


def test_a_save_that_fails_does_not_end_the_run(run):
    class FullOnce(Hooks):
        full = True

        def before_save_phase(self, phase):
            if phase == "weights" and self.full:
                self.full = False
                raise OSError(28, "No space left on device")

    assert run("train.steps=6", "checkpoint.every=3", hooks=FullOnce())[0] == 0
    assert "warning: cannot write checkpoint" in run.out
    first, last = events(run, "checkpoint")
    assert "No space left" in first["error"]
    assert last["step"] == 6
    assert "error" not in last


def test_a_refused_start_leaves_the_run_as_it_was(run):
    run("train.steps=3")
    folder = run.tmp_path / "run"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for change in ("model.width=64", "run.seed=7", "optimizer.name=adamw"):
        assert run(change)[0] == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew(run):
    run("train.steps=6", "checkpoint.every=3")
    for path in (run.tmp_path / "run" / "checkpoints").iterdir():
        (path / "model.safetensors").unlink()
    _, records, err = run("train.steps=9")
    assert "no checkpoint is whole" in err
    assert "step_00000003" in err
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_set_aside_by_a_killed_rewrite_comes_back(run):
    _, whole, _ = run("train.steps=6", "checkpoint.every=3", folder="whole")
    assert run("train.steps=6", "checkpoint.every=0", hooks=SignalInStep(4))[0] == STOPPED
    folder = run.tmp_path / "run" / "checkpoints"
    (folder / "step_00000004").rename(folder / ".step_00000004.old")
    (folder / ".step_00000004.tmp").mkdir()
    status, parts, _ = run("train.steps=6", "checkpoint.every=3")
    assert status == 0
    assert "resumed from" in run.out
    assert losses(parts) == losses(whole)
    assert not list(folder.glob(".step_*"))


def test_a_full_disk_under_the_metrics_is_one_line(run, monkeypatch):
    from launch.monitoring.metrics import Metrics

    def full(*_):
        raise OSError(28, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(Metrics, "write", full)
    status, _, err = run("train.steps=3")
    assert status == 2
    assert err == "error: [Errno 28] No space left on device: 'metrics.jsonl'\n"
