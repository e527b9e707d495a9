"""Training runs on several processes over gloo, for tests. The processes are forked from a server that has imported everything:
under torchrun each of them takes 10 s for that. torchrun itself is in test_launch_faults.py and test_launch_heartbeat.py.

One start takes several runs. What goes wrong in one is said by the words before its arguments (`carry_out`).
"""

import itertools
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from host_waits import HostWaits

import train
from celo2 import optimizer
from celo2.blocked import PLAIN
from celo2.stack import local
from launch.private import leave
from launch.run import ranks
from launch.run.hooks import Hooks

ROOT = Path(__file__).parents[2]
IMPORTED = ["forked_runs", "deepspeed", "torch.distributed.fsdp", "matplotlib.backends.backend_agg"]
CONTEXT = multiprocessing.get_context("forkserver")


def run_on_ranks(world, folder, runs, environment=None):
    """Carry out `runs`, lists of arguments of train.py, in `world` processes, which write into `folder`.

    Returns:
        statuses: of each run on each rank, or the exit status of a process that ended before it was through.
        stdout, stderr: of all ranks.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests/launch")])
    CONTEXT.set_forkserver_preload(IMPORTED)
    forkserver.ensure_running()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for file in folder.glob("rank[0-9]*"):
        file.unlink()
    launched = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(environment or {})}
    started = []
    for rank in range(world):
        own = launched | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(CONTEXT.Process(target=carry_out, args=(folder, runs, own), daemon=True))
        started[-1].start()
    try:
        for process in started:
            process.join()
    finally:
        for process in started:
            process.kill()
    statuses = []
    for rank, process in enumerate(started):
        told = folder / f"rank{rank}.statuses"
        statuses.append(json.loads(told.read_text()) if told.exists() else process.exitcode)
    texts = ["".join((folder / f"rank{rank}.{kind}").read_text() for rank in range(world)) for kind in ("out", "err")]
    return SimpleNamespace(statuses=statuses, stdout=texts[0], stderr=texts[1])


def spawn(world, folder, runs, statuses):
    """The same, and check the statuses of `runs` on every rank."""
    done = run_on_ranks(world, folder, runs)
    assert done.statuses == [statuses] * world, f"{done.statuses}\n{done.stdout}{done.stderr}"
    return done


def carry_out(folder, runs, environment):
    """Carry out `runs` in this process, and write their exit statuses. The words before the arguments of a run:

    "rank 1: section.key=value": one argument more, of that rank alone; "rank 1: another torch"; "tamper": matrices are not
    orthogonalized; or what `Fault` does.
    """
    os.environ.update(environment)
    rank, status = environment["RANK"], 1
    for number, kind in ((1, "out"), (2, "err")):
        file = os.open(folder / f"rank{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    try:
        torch.set_num_threads(1)
        dist.destroy_process_group = lambda *_: None  # the runs share the group: a new one would meet stale addresses
        passes_for, version, statuses = optimizer.passes_for, ranks.version, []
        for arguments in runs:
            optimizer.passes_for, ranks.version = passes_for, version
            hooks = None
            if arguments[0].startswith("rank 1: "):
                given = arguments.pop(0).removeprefix("rank 1: ")
                if rank == "0":
                    pass
                elif given == "another torch":
                    ranks.version = lambda name: "9.9" if name == "torch" else version(name)
                else:
                    arguments.append(given)
            if arguments[0] == "tamper":
                arguments.pop(0)
                optimizer.passes_for = lambda device: PLAIN._replace(newton_schulz=lambda u: u)
            if not arguments[0].endswith(".yaml"):
                hooks = Fault(arguments.pop(0).partition(" ")[0])
            if hooks is not None:
                with HostWaits(hooks) as waits:
                    statuses.append(train.main(arguments, waits))
                if rank == "0":
                    (run_dir,) = (given.removeprefix("run.dir=") for given in arguments if given.startswith("run.dir="))
                    Path(run_dir).joinpath("waits.json").write_text(json.dumps(waits.of_step))
            else:
                statuses.append(train.main(arguments))
            AcceleratorState._reset_state(reset_partial_state=True)
        (folder / f"rank{rank}.statuses").write_text(json.dumps(statuses))
        status = 0
    except Exception:
        sys.excepthook(*sys.exc_info())
    leave(status)


class Fault(Hooks):
    """What goes wrong in a run: "signal" or "hang" in step 6 of rank 1, "NaN" losses in two steps, once each; or
    "gradient=VALUE" after the reduction in step 6, of rank 1 alone."""

    def __init__(self, kind):
        self.kind, self.calls, self.handle = kind, itertools.count(1), None

    def before_step(self, step, strategy):
        if self.kind == "NaN" and next(self.calls) in (6, 7):
            self.handle = strategy.loss_model.register_forward_hook(lambda module, inputs, loss: loss * math.nan)
        if self.kind in ("signal", "hang") and (step, strategy.accelerator.process_index) == (6, 1):
            os.kill(os.getpid(), signal.SIGTERM) if self.kind == "signal" else time.sleep(600)

    def after_backward(self, step, strategy, loss):
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        if self.kind.startswith("gradient") and step == 6 and strategy.accelerator.process_index == 1:
            value = float(self.kind.removeprefix("gradient="))
            local(next(p.grad for p in strategy.loss_model.parameters() if p.grad is not None)).view(-1)[0] = value
