"""Runs that restart themselves, lines that a full disk refuses, replicas that differ, and what a signal's grace must hold."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from celo2 import ShardingError
from celo2.distributed.shard import local_shard_of
from configs.average import AverageOptions
from launch.distributed import verification as verification_module
from launch.distributed.average import Average
from launch.distributed.heartbeat import Beat, RankError, blame, got_further
from launch.distributed.replicas import bit_sums, in_words, named, require_equal_replicas
from launch.distributed.strategy import ShardedParameter, is_expert
from launch.monitoring import growing
from launch.monitoring.metrics import Lines
from launch.monitoring.signals import STOP_SIGNALS
from launch.run.grace import Grace
from launch.run.hooks import Hooks
from launch.run.restart import NO_REASON, record_lost_rank, restart_event, restart_note

ROOT = Path(__file__).parents[2]


def beat(marks, progress=0, left=False):
    return Beat(1, marks, "saving", "node", 1, left=left, progress=progress)


def test_progress_counts_for_who_holds_up_the_others():
    before = {0: beat(7), 1: beat(7)}
    assert not got_further(before, {0: beat(7), 1: beat(7)})
    assert got_further(before, {0: beat(8), 1: beat(7)})
    assert got_further(before, {0: beat(7, 1), 1: beat(7)})  # the first one works, the other waits at the same place
    before = {0: beat(9), 1: beat(7)}
    assert not got_further(before, {0: beat(9, 1), 1: beat(7)})  # it writes in the background, while the other hangs
    assert got_further(before, {0: beat(9), 1: beat(7, 1)})
    waiting, answers = {0: beat(9), 1: replace(beat(7), disk=True)}, {0: 0.0, 1: 0.0}
    assert blame(waiting, answers, 299, 60) is None
    assert "rank 1 (node, pid 1) has hung for 300 s" in blame(waiting, answers, 300, 60)
    both = {rank: replace(beat(9), disk=True, waits=rank == 1) for rank in (0, 1)}  # for the checkpoint that threads write
    assert "rank 0 (node, pid 1) has hung for 300 s, while others wait" in blame(both, answers, 300, 60)
    for waits in (False, True):
        nobody = {rank: replace(beat, waits=waits) for rank, beat in both.items()}
        assert "no single rank can be blamed" in blame(nobody, answers, 300, 60)
    assert got_further({0: beat(9), 1: beat(7, left=True)}, {0: beat(9, 1), 1: beat(7, left=True)})


def test_what_a_full_disk_refuses_waits(tmp_path, monkeypatch):
    said: list[str] = []
    lines, real = Lines(tmp_path / "metrics.jsonl", said.append), open
    lines.write({"step": 1})

    class Full:
        """A file that takes half of what it is given."""

        def __init__(self, file):
            self.file = file
            self.seek, self.truncate = file.seek, file.truncate

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    def full(*args, **options):
        return Full(real(*args, **options)) if "ab" in args else real(*args, **options)

    monkeypatch.setattr(growing, "open", full, raising=False)
    lines.write({"step": 2})
    lines.write({"step": 3})
    lines.flush()
    assert [json.loads(line)["step"] for line in lines.path.read_text().splitlines()] == [1]
    monkeypatch.undo()
    lines.write({"step": 4})
    assert [json.loads(line)["step"] for line in lines.path.read_text().splitlines()] == [1, 2, 3, 4]
    assert len(said) == 2 and "metrics.jsonl cannot be written (No space left on device)" in said[0] and "again" in said[1]
    with lines.path.open("a") as file:  # a kill cut a line short
        file.write('{"st')
    Lines(lines.path, said.append).write({"step": 5})
    assert lines.path.read_text().splitlines()[-2:] == ['{"st', '{"step": 5}']


def test_events_say_why_a_run_was_started_again(tmp_path):
    assert restart_event(tmp_path, 0) is None
    record_lost_rank(tmp_path, "rank 1 is gone")
    assert not list(tmp_path.iterdir())  # the start was refused: no run is there
    events = Lines(tmp_path / "events.jsonl", print)
    events.write({"event": "start", "step": 0})
    Lines(tmp_path / "metrics.jsonl", print).write({"step": 7, "loss": 1.0})
    killed = restart_event(tmp_path, 5)
    assert killed["attempt"] == 1 and killed["reason"] == NO_REASON and (killed["reached"], killed["steps_lost"]) == (7, 2)
    assert restart_note(killed).startswith("restart 1 from step 5; 2 steps after it are done again; the start before: it ended")
    events.write(killed)
    record_lost_rank(tmp_path, "rank 1 is gone")
    lost = restart_event(tmp_path, 7)
    assert (lost["attempt"], lost["reason"], lost["steps_lost"]) == (2, "rank 1 is gone", 0)
    for last, reason in (
        ({"event": "stopped", "reason": "signal"}, "stopped by a signal"),
        ({"event": "finished"}, "it was finished"),
        ({"event": "stopped", "reason": "error", "error": "no space"}, "no space"),
    ):
        events.write(lost)
        events.write(last)
        assert restart_event(tmp_path, 7)["reason"] == reason
    record_lost_rank(tmp_path, "rank 1 is gone")
    events.write({"event": "stopped", "reason": "error", "error": "Connection closed by peer"})  # what rank 0 met for it
    assert restart_event(tmp_path, 7)["reason"] == "rank 1 is gone"


def test_one_changed_bit_changes_the_sum():
    tensors = [torch.randn(5, 3), torch.zeros(()), torch.ones(4, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bool)]
    before = bit_sums(tensors)
    tensors[0].view(torch.int32)[4, 2] ^= 1
    assert (bit_sums(tensors) != before).tolist() == [True, False, False, False]
    assert in_words({"a": {0: 5, 1: 5, 2: 6}, "b": {0: 1, 1: 2, 2: 1}}) == ("a and 1 more", [2])
    assert in_words({"a": {0: 5, 1: 6}}) == ("a", [0, 1])  # nobody can tell who is right
    assert named([2], ["n0", "n0", "n1"]) == "rank 2 (n1)"


@pytest.mark.parametrize(("where", "name"), [("shards", "second"), ("average", "the average of second")])
def test_a_replica_that_differs_is_named_by_all(where, name, tmp_path):
    """Three ranks under ddp: equal ones pass, then one bit flips on one of them, in a weight or in its average."""

    def work(rank):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=rank, world_size=3)
        weights = {name: nn.Parameter(torch.arange(6.0)) for name in ("first", "second")}
        shards = {name: ShardedParameter(p, local_shard_of(p)) for name, p in weights.items()}
        config = SimpleNamespace(distributed=SimpleNamespace(strategy="ddp"))
        device = SimpleNamespace(device=torch.device("cpu"))
        strategy = SimpleNamespace(world=3, copies=1, copies_group=None, buffers={}, shards=shards)
        strategy.device, strategy.average = device.device, Average(AverageOptions("ema", 0.9, 0), weights, device.device)
        strategy.config, strategy.accelerator = config, device
        require_equal_replicas(strategy, 1)
        if rank == 1:
            held = {"shards": weights["second"].data, "average": strategy.average.means["second"]}[where]
            held.view(torch.int32)[3] ^= 1
        with pytest.raises(RankError) as error:
            require_equal_replicas(strategy, 2)
        (tmp_path / f"said{rank}").write_text(str(error.value))

    children = [fork(lambda rank=rank: work(rank)) for rank in range(3)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]
    [line] = {(tmp_path / f"said{rank}").read_text() for rank in range(3)}
    assert line.startswith(f"the replicas differ after step 2: {name} on rank 1 ({socket.gethostname()}); this step is not saved")


@pytest.mark.slow
def test_what_comparing_replicas_costs():
    """Seconds for the sums over 300 million weights in 100 tensors, on one CPU thread (-s prints them)."""
    torch.set_num_threads(1)
    tensors = [torch.randn(3_000_000) for _ in range(100)]
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        bit_sums(tensors)
        times.append(time.perf_counter() - begin)
    print(f"\n300M weights: {statistics.median(times):.2f} s (median of 5; {min(times):.2f} to {max(times):.2f})")
    assert min(times) < 5


def fork(work):
    """The pid of a process that does `work`; status 1 after an error."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def moe(parameters, matrices, monkeypatch, others=()):
    """A verification of `parameters`, on one of several ranks; `others` are the reports of the others."""
    counter = torch.optim.SGD(list(parameters.values()), lr=0.1)
    counter.orthogonalized = 0
    shards = {name: ShardedParameter(p, local_shard_of(p)) for name, p in parameters.items()}
    strategy = SimpleNamespace(world=2, counter=counter, optimizer=counter, shards=shards, matrices=matrices, copies=1)
    strategy.hidden = dict.fromkeys(parameters, 1)
    strategy.config = SimpleNamespace(distributed=SimpleNamespace(strategy="fsdp2"))
    monkeypatch.setattr(verification_module, "gather_objects", lambda own, group: [own, *others])
    return verification_module.Verification(strategy), counter


def test_an_expert_without_a_token_is_no_fault_and_a_skipped_matrix_is(monkeypatch):
    assert is_expert("layers.0.mlp.experts.3.up_proj.weight") and not is_expert("layers.0.mlp.up_proj.weight")
    names = ["attention.weight", "experts.0.weight", "experts.1.weight"]

    def verify(without, orthogonalized, others=((0, None, {"experts.1.weight"}),)):
        parameters = {name: nn.Parameter(torch.ones(4, 4)) for name in names}
        for name, p in parameters.items():
            p.grad = None if name in without else torch.ones_like(p)
        verification, counter = moe(parameters, 3, monkeypatch, others)
        counter.step()
        counter.orthogonalized = orthogonalized
        verification.check(healthy=True)

    verify(["experts.1.weight"], 2)  # on no rank a token
    verify([], 3)
    with pytest.raises(ShardingError, match="2 matrices were orthogonalized over all ranks, but the model has 3"):
        verify(["experts.0.weight"], 2)  # the other rank had a token for it
    with pytest.raises(ShardingError, match="1 matrices"):
        verify(["attention.weight", "experts.1.weight"], 1)  # no expert: a gradient that was lost
    with pytest.raises(ShardingError, match="2 matrices"):
        verify([], 2)  # given to AdamW


@pytest.fixture
def without_nohup():
    """SIGHUP as usual, even if the suite itself runs under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_every_signal_of_a_scheduler_saves(run, without_nohup):
    for number in set(STOP_SIGNALS) - {signal.SIGINT, signal.SIGTERM}:

        class Send(Hooks):
            def before_step(self, step, strategy, number=number):
                os.kill(os.getpid(), number)

        status, _, _ = run("train.steps=2", "eval.sequences=1", "log.sample_tokens=0", folder=number.name, hooks=Send())
        assert status == 75 and "a signal: saving about" in run.out and "saved; the same command continues" in run.out, number
    status, _, _ = run("train.steps=2", "eval.sequences=1", "log.sample_tokens=0", folder="SIGHUP")
    events = [json.loads(line) for line in (run.tmp_path / "SIGHUP/events.jsonl").read_text().splitlines()]
    [event] = [event for event in events if event["event"] == "restart"]
    assert status == 0 and event["reason"] == "stopped by a signal" and (event["step"], event["steps_lost"]) == (1, 0)


def test_nohup_stays_what_it_says():
    code = "import os, signal; from launch.monitoring.signals import StopSignals\n"
    code += "with StopSignals() as s:\n  s.wait = True; os.kill(os.getpid(), signal.SIGHUP); print(s.received)"
    run = subprocess.run(["nohup", sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout == "False\n", run.stderr


def test_a_save_that_is_longer_than_the_launchers_grace(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    weight = nn.Parameter(torch.zeros(1000))
    optimizer = SimpleNamespace(state={weight: {"exp_avg": torch.zeros(2, 1000)}})
    grace = Grace(SimpleNamespace(shards={"w": ShardedParameter(weight, local_shard_of(weight))}, optimizer=optimizer))
    assert "saving about 1.2e-05 GB, the first one; torchrun kills the ranks 30 s after a signal" in grace.stopping()
    assert grace.saved({"bytes": 10, "stall_seconds": 1.0, "write_seconds": 2.0}) is None
    slow = {"bytes": 10**10, "stall_seconds": 1.0, "write_seconds": 40.0}
    assert "takes 41 s" in grace.saved(slow) and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=164" in grace.launcher()
    assert grace.saved(slow) is None and "saving about 10 GB, the last one took 41.0 s" in grace.stopping()


@pytest.fixture
def small_disk(tmp_path):
    """A folder with a file system of 80 MB; checkpoints leave 64 MB free."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_for_a_while_loses_no_line(run, small_disk):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Fill(Hooks):
        def before_step(self, step, strategy):
            if step == 3:  # what a page of memory has left takes a dozen lines
                with suppress(OSError), (small_disk / "fill").open("wb") as file:
                    while True:
                        file.write(bytes(4096))
                        file.flush()
            if step == 37:
                (small_disk / "fill").unlink()

    arguments = ["train.steps=40", "eval.every=20", "checkpoint.every=20", "log.trackers=[tensorboard]"]
    status, records, _ = run(*arguments, folder="small/run", hooks=Fill())
    assert status == 0 and [r["step"] for r in records if "loss" in r] == list(range(1, 41)), run.out
    assert [r["step"] for r in records if "val_loss" in r] == [20, 40]
    assert run.out.count("metrics.jsonl cannot be written (No space left on device)") == 1
    assert run.out.count("metrics.jsonl can be written again; nothing is lost") == 1
    assert len(re.findall(r"tfevents\S* cannot be written \(No space left on device\)", run.out)) == 1
    found = EventAccumulator(str(small_disk / "run" / "tensorboard")).Reload()
    assert {event.step for event in found.Scalars("step_loss")} == set(range(1, 41))
    events = [json.loads(line) for line in (small_disk / "run/events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] != "start"] == ["checkpoint", "checkpoint", "finished"]
    assert "error" in events[-3] and "error" not in events[-2]
    assert sorted(p.name for p in (small_disk / "run/checkpoints").iterdir()) == ["step_00000040"]
