"""Training runs on several processes over gloo, for tests. The processes are forked from a server that has imported everything:
under torchrun each of them takes 10 s for that. torchrun itself is in test_launch_faults.py and test_launch_heartbeat.py.

One start carries out several runs. Words before the arguments of a run say what goes wrong in it (`carry_out`).
"""

import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from host_waits import HostWaits

import train
from celo2 import optimizer
from celo2.blocked import PLAIN
from celo2.stack import local
from launch import fault_injection
from launch.private import leave
from launch.run import ranks
from launch.run.hooks import Hooks

ROOT = Path(__file__).parents[2]
IMPORTED = ["forked_runs", "deepspeed", "torch.distributed.fsdp", "matplotlib.backends.backend_agg"]
CONTEXT = multiprocessing.get_context("forkserver")


class Launched:
    """`world` processes that carry out `target(folder, *arguments)`, as torchrun starts them: the store is the launcher's, and
    once one has failed the others get SIGTERM, and 30 s later SIGKILL. What each writes goes to `folder`/rank<n>.out and .err.
    """

    def __init__(self, world, folder, target, *arguments, environment=None):
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests/launch")])
        CONTEXT.set_forkserver_preload(IMPORTED)
        forkserver.ensure_running()
        for file in folder.glob("rank[0-9]*"):
            file.unlink()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        launched = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
        launched |= {"TORCHELASTIC_USE_AGENT_STORE": "True", **(environment or {})}
        self.folder, self.ranks, self.kill_at = folder, [], None
        for rank in range(world):
            own = launched | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.ranks.append(CONTEXT.Process(target=begin, args=(folder, own, target, *arguments), daemon=True))
            self.ranks[-1].start()

    def poll(self):
        """The status as torchrun has it, 0 or 1; None while a process lives."""
        living = [process for process in self.ranks if process.exitcode is None]
        failed = any(process.exitcode for process in self.ranks)
        if not living:
            return int(failed)
        if failed and self.kill_at is None:
            self.kill_at = time.monotonic() + 30
            for process in living:
                process.terminate()
        if self.kill_at is not None and time.monotonic() > self.kill_at:
            self.kill()
        return None

    def kill(self):
        """SIGKILL to all."""
        for process in self.ranks:
            process.kill()

    def wait(self):
        """The status once all have ended."""
        while (status := self.poll()) is None:
            time.sleep(0.05)
        return status

    def text(self, kind):
        """What all ranks wrote, "out" or "err"."""
        return "".join(file.read_text() for file in sorted(self.folder.glob(f"rank[0-9]*.{kind}")))


def begin(folder, environment, target, *arguments):
    """Set up a process, before anything else."""
    os.setsid()
    os.environ.update(environment)
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"rank{environment['RANK']}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    try:
        leave(target(folder, *arguments))
    except Exception:
        sys.excepthook(*sys.exc_info())
        leave(1)


def run_on_ranks(world, folder, runs):
    """Carry out `runs`, lists of arguments of train.py, in `world` processes, which write into `folder`.

    Returns:
        statuses: of each run on each rank, or the exit status of a process that ended before it was done.
        stdout, stderr: of all ranks.
    """
    launched = Launched(world, folder, carry_out, runs)
    try:
        launched.wait()
    finally:
        launched.kill()
    statuses = []
    for rank, process in enumerate(launched.ranks):
        told = folder / f"rank{rank}.statuses"
        statuses.append(json.loads(told.read_text()) if told.exists() else process.exitcode)
    return SimpleNamespace(statuses=statuses, stdout=launched.text("out"), stderr=launched.text("err"))


def spawn(world, folder, runs, statuses):
    """As `run_on_ranks`, and check the statuses of `runs` on every rank."""
    done = run_on_ranks(world, folder, runs)
    assert done.statuses == [statuses] * world, f"{done.statuses}\n{done.stdout}{done.stderr}"
    return done


def train_with_fault(folder, arguments):
    """train.py with the fault of the environment (faulty_train.py)."""
    import faulty_train  # reads the environment

    return faulty_train.main(arguments)


def torture(folder, arguments):
    """`python -m launch.torture`, which starts ranks of its own."""
    for name in list(os.environ):
        if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") or name.startswith(("MASTER_", "TORCHELASTIC_")):
            del os.environ[name]
    return fault_injection.main(arguments)


def carry_out(folder, runs):
    """Carry out `runs` in this process, and write their exit statuses. The words before the arguments of a run:

    "rank 1: section.key=value": one argument more, of that rank alone; "rank 1: another torch"; "tamper": matrices are not
    orthogonalized; or what `Fault` does.
    """
    rank = os.environ["RANK"]
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
    (folder / f"rank{rank}.statuses").write_text(json.dumps(statuses))
    return 0


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
