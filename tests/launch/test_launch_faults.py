"""One fault in each phase of a training run: who is named, after how long, with which status, and what follows.

`pytest -m slow tests/launch/test_launch_faults.py -s` prints the table. Each row is two or three starts of processes: forked ones
(forked_runs.py), or those of torchrun where it is the point.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from forked_runs import Launched, train_with_fault

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TIMEOUT = 10.0  # s; DeepSpeed takes 5 s to start on a busy machine
SLACK = 8.0  # s that a loaded machine may add
DISK = 5 * TIMEOUT
SLOW = f"slow{2 * TIMEOUT:g}"
ARGUMENTS = ["train.steps=6", "train.micro_batch_size=4", "log.sample_tokens=0", f"distributed.timeout={TIMEOUT:g}"]
ARGUMENTS += ["checkpoint.every=2", "checkpoint.keep=9", "eval.every=4", "eval.sequences=8"]


class Ranks:
    """Starts train.py on two ranks, with a fault or without."""

    def __init__(self, config: Path, data: Path, folder: Path) -> None:
        self.config, self.data, self.folder, self.output = config, data, folder, ""

    def start(self, fault=None, launcher=None, arguments=(), name="run", ranks=2, agent=0):
        """Start the ranks; those of one node, `agent`, with the options `launcher` under torchrun."""
        for file in (*self.folder.glob("pid*"), *self.folder.glob("rank[0-9]*"), self.folder / "fault") if agent == 0 else ():
            file.unlink(missing_ok=True)
        command = [str(self.config), f"data.dir={self.data}", f"run.dir={self.folder / name}", *ARGUMENTS, *arguments]
        environment = {"FOLDER": str(self.folder), "FAULT": json.dumps(fault)}
        if launcher is None:
            return Launched(ranks, self.folder, train_with_fault, command, environment=environment)
        torchrun = [sys.executable, "-m", "torch.distributed.run", *launcher, f"--nproc_per_node={ranks}"]
        command = [*torchrun, str(Path(__file__).with_name("faulty_train.py")), *command]
        with open(self.folder / f"rank{agent}.out", "w") as file:
            environment = {**os.environ, **environment}
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)

    def read(self):
        """What all processes wrote so far."""
        return "".join(file.read_text() for file in sorted(self.folder.glob("rank[0-9]*.*")))

    def end(self, process, limit=300):
        """Wait for the end; returns (status, seconds since the fault until the first line that names a rank, or None)."""
        named, begin = None, time.monotonic()
        try:
            while process.poll() is None and time.monotonic() - begin < limit:
                fault = self.folder / "fault"
                if named is None and fault.exists() and re.search("^error: rank", self.read(), re.M):
                    named = time.time() - float(fault.read_text())
                    for pid in self.folder.glob("pid*"):  # torchrun waits 30 s for one that is stopped
                        with suppress(ProcessLookupError):
                            os.kill(int(pid.read_text()), signal.SIGCONT)
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill() if isinstance(process, Launched) else os.killpg(process.pid, signal.SIGKILL)
        status, self.output = process.wait(), self.read()
        return status, named

    def losses(self, name="run"):
        """The training losses by step."""
        records = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        return {r["step"]: r["loss"] for r in records if "loss" in r}

    def events(self, kind, name="run"):
        """The events of one kind."""
        events = map(json.loads, (self.folder / name / "events.jsonl").read_text().splitlines())
        return [event for event in events if event["event"] == kind]


@pytest.fixture
def ranks(run, prepared, tmp_path):
    run("train.steps=1", "log.sample_tokens=0", "eval.sequences=1", folder="config")  # writes config.yaml
    return Ranks(tmp_path / "config.yaml", prepared, tmp_path)


# Rank at fault, phase, fault, strategy, seconds until it is named (None: nobody is, the run ends well).
CASES = [
    (0, "lock", "SIGKILL", "ddp", TIMEOUT),
    (1, "data", "hang", "ddp", DISK),
    (0, "find", "hang", "ddp", DISK),
    (1, "model", "SIGSTOP", "fsdp2", TIMEOUT),
    (1, "model", "hang", "ddp", TIMEOUT),
    (1, "shard", "SIGKILL", "zero2", TIMEOUT),
    (0, "resume", SLOW, "ddp", None),
    (1, "step", "hang", "fsdp2", TIMEOUT),
    (1, "forward", "hang", "fsdp2", TIMEOUT),  # no mark is set since the batch was loaded
    (1, "forward", "hang", "zero2", TIMEOUT),
    (0, "update", "SIGSTOP", "ddp", TIMEOUT),
    (1, "update", "raise", "zero3", 4.0),
    (1, "evaluate", "hang", "ddp", TIMEOUT),
    (0, "evaluate", "SIGKILL", "fsdp2", TIMEOUT),
    (0, "summary", SLOW, "ddp", None),
    (1, "save", "SIGKILL", "fsdp2", TIMEOUT),
    (1, "save", "hang", "zero1", DISK),
    (0, "write", SLOW, "ddp", None),
    (0, "write", "hang", "ddp", DISK),
    (0, "end", SLOW, "fsdp2", None),
    (0, "end", "SIGKILL", "ddp", TIMEOUT),
    (1, "end", "hang", "ddp", DISK),
    (0, "finish", SLOW, "ddp", None),
]


@pytest.mark.parametrize(("rank", "phase", "do", "strategy", "seconds"), CASES)
def test_a_fault_in_each_phase(rank, phase, do, strategy, seconds, ranks):
    arguments = [f"distributed.strategy={strategy}"]
    n = 3 if phase in ("step", "forward", "update") else 1
    status, named = ranks.end(ranks.start({"rank": rank, "at": phase, "do": do, "n": n}, arguments=arguments))
    lines = set(re.findall("^error: (.*)$", ranks.output, re.M))
    if seconds is None:
        assert (status, lines) == (0, set()), ranks.output
    else:
        assert status != 0 and named is not None and named < seconds + 4 + SLACK, ranks.output
        assert len(lines) == 1 and re.match(rf"rank {rank} \(", next(iter(lines))), ranks.output
    begin = time.monotonic()
    end, _ = ranks.end(ranks.start(arguments=[*arguments, "distributed.timeout=60"]))  # again, on a machine however busy
    again = sum(event["steps_lost"] for event in ranks.events("restart"))
    assert end == 0 and sorted(ranks.losses()) == list(range(1, 7)), ranks.output
    who = f"rank {rank} after {named:.1f} s, 70" if named is not None else "nobody, 0"
    print(f"\n| {phase} | {strategy} | rank {rank} {do} | {who} | {again} steps again, {time.monotonic() - begin:.1f} s |")


RESTARTS = [("ddp", "SIGKILL", "step"), ("fsdp2", "hang", "step"), ("zero1", "raise", "update"), ("ddp", "SIGKILL", "save")]


@pytest.mark.parametrize(("strategy", "do", "phase"), RESTARTS)
def test_torchrun_goes_on_by_itself(strategy, do, phase, ranks):
    """The same losses, bit for bit, as without the fault; events.jsonl says why, and from where."""
    arguments = [f"distributed.strategy={strategy}"]
    fault = {"rank": 1, "at": phase, "do": do, "n": 4 if phase != "save" else 2}
    status, _ = ranks.end(ranks.start(fault, ["--standalone", "--max-restarts=2"], arguments))
    assert status == 0, ranks.output
    [event] = ranks.events("restart")
    assert event["attempt"] == 1 and event["step"] == 2 and event["steps_lost"] <= 2 and "rank 1 (" in event["reason"]
    assert ranks.end(ranks.start(arguments=arguments, name="whole"))[0] == 0
    assert ranks.losses() == ranks.losses("whole")
    print(f"\n| {strategy} | rank 1 {do} | step {event['step']}, {event['steps_lost']} done again | bit for bit |")


def test_fewer_ranks_go_on(ranks):
    """A loop that starts with what is there: 2 ranks, then 1, then 2."""
    ranks.end(ranks.start({"rank": 1, "at": "step", "do": "SIGKILL", "n": 4}))
    ranks.end(ranks.start({"rank": 0, "at": "step", "do": "SIGTERM", "n": 2}, ranks=1))
    status, _ = ranks.end(ranks.start())
    assert status == 0, ranks.output
    assert [event["processes"] for event in ranks.events("restart")] == [1, 2]
    ranks.end(ranks.start(name="whole"))
    whole, own = ranks.losses("whole"), ranks.losses()
    assert own.keys() == whole.keys() and max(abs(own[s] / whole[s] - 1) for s in whole) < 1e-5
    assert ranks.end(ranks.start(ranks=3, name="odd"))[0] != 0 and "train.batch_size" in ranks.output  # 8 sequences


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_to_torchrun_alone_saves(number, ranks):
    process = ranks.start(launcher=["--standalone"], arguments=["train.steps=100000", "checkpoint.every=0", "eval.every=0"])
    while "step      3/" not in ranks.read():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    ranks.end(process)
    assert "a signal: saving about" in ranks.output and "torchrun kills the ranks 30 s after a signal" in ranks.output
    assert len(list((ranks.folder / "run" / "checkpoints").glob("step_*"))) == 1


def listens(endpoint):
    """Whether somebody takes connections there."""
    host, port = endpoint.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def parent_of(pid):
    """The process that started another one."""
    return int(subprocess.run(["ps", "-o", "ppid=", "-p", str(pid)], capture_output=True, text=True).stdout)


def test_a_lost_node_leaves_the_others_training(ranks):
    """`torchrun --nnodes 1:2`, two agents on one machine. The second is lost with its rank: the first, which has the store of the
    rendezvous, goes on alone by itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    launcher = ["--nnodes=1:2", "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=nodes"]
    fault = {"rank": 1, "at": "step", "do": "hang", "n": 4}
    start = partial(ranks.start, fault, launcher, ["distributed.strategy=fsdp2"], ranks=1)
    agents = [start(agent=0)]
    try:
        while not listens(endpoint):
            time.sleep(0.1)
        agents.append(start(agent=1))
        while not (ranks.folder / "fault").exists():
            assert all(agent.poll() is None for agent in agents), ranks.read()
            time.sleep(0.1)
        parents = {pid: parent_of(pid) for pid in (int(file.read_text()) for file in ranks.folder.glob("pid*"))}
        [worker] = [pid for pid, parent in parents.items() if parent == agents[1].pid]
        for pid in (agents[1].pid, worker):
            os.kill(pid, signal.SIGKILL)
        assert ranks.end(agents[0])[0] == 0, ranks.output
    finally:
        for agent in agents:
            agent.terminate()  # it ends its rank
            agent.wait()
    [event] = ranks.events("restart")
    assert event["processes"] == 1 and event["step"] == 2 and event["reason"].startswith("rank "), event
    assert sorted(ranks.losses()) == list(range(1, 7))
    print(f"\n| fsdp2 | a node of two is lost | step {event['step']}, {event['steps_lost']} done again | on one node |")
