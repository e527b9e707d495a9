"""`python -m launch.torture`: fault injection. Kills, damage, full disks and bad gradients: does a training run survive them?

A small run is trained once without disturbance. Then the same run is started again and again, is killed with SIGKILL at random
moments and inside each phase of a save, and resumes each time by itself. At the end every line of its metrics must equal the
undisturbed run's, bit for bit. The other faults have checks of their own. Every run is a forked process of this one, so that a
start needs no imports. Use it on the machine and file system that your own runs use.

With `--ranks N` a run has N processes on this machine, over gloo, which write its checkpoints together. A kill hits one of them,
or all; damage hits every file of a checkpoint; the lack of permission hits one rank alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.backends.backend_agg  # noqa: F401  runs import it when they draw: here once, before they are forked
import torch
from torch import Tensor

import train
from celo2.training.metrics import read_metrics
from data.prepare import prepare
from launch.checkpoint.folders import CHECKPOINTS, folders_of
from launch.checkpoint.save import PHASES, RANK_PHASES
from launch.checkpoint.verify import MANIFEST, checkpoint_files, find_checkpoint, list_checkpoints, step_of
from launch.command import at_least
from launch.distributed.strategy import Strategy
from launch.monitoring.signals import STOPPED
from launch.run.hooks import Hooks

STEPS = 30
CONFIG = f"""
run: {{name: torture}}
model: {{layers: 2, width: 32, heads: 2, context: 32, dropout: 0.1}}
train: {{steps: {STEPS}, batch_size: 8, micro_batch_size: 4}}
optimizer: {{lr: 5e-3}}
checkpoint: {{every: 3, patience: 0}}
distributed: {{timeout: 20}} # DeepSpeed takes more than 5 s to start on a busy machine
log: {{every: 1, sample_tokens: 0}}
eval: {{every: 5, sequences: 16}}
"""
FAULTS = ("kills", "damage", "signals", "disks", "gradients")
DISK, ROOM = 8 << 20, 200 << 10  # bytes of a small disk, and of the space left on it
SURVIVORS = 60.0  # s in which all other ranks must end after one was killed
CLOCK = ("seconds", "tokens_per_second", "optimizer_seconds")  # what differs between two equal runs


class Row(NamedTuple):
    """A line of the table."""

    fault: str
    injected: int
    survived: int
    lost: str  # what was lost, in words


class SignalAt(Hooks):
    """Sends the process of `rank` a signal when it comes to `point` for the `occurrence`-th time.

    `point`: "step", "evaluation", or a phase of a save (`launch.checkpoint.save.PHASES`).
    """

    def __init__(self, number: signal.Signals, point: str, occurrence: int = 1, rank: int = 0) -> None:
        self.number, self.point, self.left, self.rank = number, point, occurrence, rank

    def _come_to(self, point: str) -> None:
        if point == self.point and own_rank() == self.rank:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.number)

    def before_step(self, step: int, strategy: Strategy) -> None:
        self._come_to("step")

    def before_evaluation(self, step: int) -> None:
        self._come_to("evaluation")

    def before_save_phase(self, phase: str) -> None:
        self._come_to(phase)


class BadGradients(Hooks):
    """A loss, and so gradients, of NaN in each of `steps`."""

    def __init__(self, steps: range) -> None:
        self.steps = steps

    def before_step(self, step: int, strategy: Strategy) -> None:
        if step in self.steps:
            poison = lambda module, inputs, loss: loss * float("nan")  # noqa: E731
            self.handle = strategy.loss_model.register_forward_hook(poison)

    def after_backward(self, step: int, strategy: Strategy, loss: Tensor) -> None:
        if step in self.steps:
            self.handle.remove()


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Make `folder` a file system of DISK bytes if mounting is permitted; yields whether it is one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


class Filled(Hooks):
    """During the run, another file fills the disk: the space left suffices for metrics, not for a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "filling"

    def before_step(self, step: int, strategy: Strategy) -> None:
        if step == STEPS * 2 // 3 and own_rank() == 0:
            left = shutil.disk_usage(self.file.parent).free - ROOM
            self.file.write_bytes(bytes(max(0, left)))


class FullDisk(Hooks):
    """From the first step on, files of the last rank may not grow beyond a small limit, as on a full disk."""

    def before_step(self, step: int, strategy: Strategy) -> None:
        if own_rank() != strategy.world - 1:
            return
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


class NoPermission(Hooks):
    """The last rank alone cannot write a checkpoint."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def before_save_phase(self, phase: str) -> None:
        if phase == "weights" and own_rank() == self.ranks - 1:
            raise PermissionError(13, "Permission denied")


@contextmanager
def read_only(folder: Path) -> Iterator[bool]:
    """Make `folder` immutable, even for root, if that is permitted; yields whether it is."""

    def change(flag: str) -> bool:
        try:
            return subprocess.run(["chattr", flag, str(folder)], capture_output=True).returncode == 0
        except OSError:
            return False

    done = change("+i")
    try:
        yield done
    finally:
        if done:
            change("-i")


def own_rank() -> int:
    """The rank of this process."""
    return int(os.environ.get("RANK", "0"))


def free_port() -> int:
    """An unused port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Laboratory:
    """A prepared data set, the undisturbed run, and a way to start runs of `ranks` processes each."""

    def __init__(self, folder: Path, options: list[str], ranks: int = 1) -> None:
        self.folder, self.options, self.ranks = folder, options, ranks
        if any("strategy=zero" in option for option in options):
            import deepspeed  # noqa: F401  once, before runs are forked
        words = f"{train.__doc__} {__doc__}".split()
        texts = [" ".join(words[i % len(words)] for i in range(n, n * 7 + 80)) for n in range(1, 21)]
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        source, out = str(folder / "text.jsonl"), folder / "data"
        prepare(source, out, tokenizer="bytes", val_fraction=0.2, workers=1, log=lambda line: None)
        (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
        if self.run("undisturbed") != 0:
            raise SystemExit(f"the undisturbed run failed: {(folder / 'undisturbed.log').read_text(encoding='utf-8')}")
        self.undisturbed = self.metrics("undisturbed")

    def start(self, name: str, hooks: Hooks, options: Sequence[str] = ()) -> list[int]:
        """Fork a run into the folder `name`, with more `options`; returns its process ids."""
        sys.stdout.flush()
        port = free_port()
        return [self._fork(name, hooks, rank, port, options) for rank in range(self.ranks)]

    def _fork(self, name: str, hooks: Hooks, rank: int, port: int, options: Sequence[str]) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            log = os.open(self.folder / f"{Path(name).name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            torch.set_num_threads(1)
            if self.ranks > 1:
                launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "MASTER_PORT": port}
                os.environ |= {key: str(value) for key, value in launched.items()} | {"MASTER_ADDR": "127.0.0.1"}
            folders = [f"data.dir={self.folder / 'data'}", f"run.dir={self.folder / name}"]
            status = train.main([str(self.folder / "config.yaml"), *folders, *self.options, *options], hooks)
        finally:
            sys.stdout.flush()
            os._exit(status)

    def wait(self, pids: list[int], rest: signal.Signals = signal.SIGTERM) -> int:
        """Exit status of a run: the first of a rank that is not 0; −N if the signal N killed that rank.

        Once a rank has failed, the others get the signal `rest`, as from torchrun. Raises RuntimeError if they do not end then.
        """
        left, found, deadline = set(pids), 0, float("inf")
        while left:
            for pid in sorted(left):
                done, status = os.waitpid(pid, os.WNOHANG)
                if not done:
                    continue
                left.discard(pid)
                if found == 0 and (found := os.waitstatus_to_exitcode(status)) not in (0, STOPPED):
                    deadline = time.monotonic() + SURVIVORS
                    for other in left:
                        os.kill(other, rest)
            if time.monotonic() > deadline:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise RuntimeError(f"{len(left)} ranks did not end within {SURVIVORS:g} s after another one")
            time.sleep(0.01)
        return found

    def run(self, name: str, hooks: Hooks | None = None, options: Sequence[str] = ()) -> int:
        """Start a run and wait for its exit status."""
        return self.wait(self.start(name, hooks or Hooks(), options))

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """What a run logged, without the clock's columns."""
        records = read_metrics(self.folder / name / "metrics.jsonl")
        return [{key: value for key, value in record.items() if key not in CLOCK} for record in records]

    def saved(self, name: str) -> int:
        """Step of the newest whole checkpoint, in the run's folder or in the second one; 0 without one."""
        return max(step_of(path) if path else 0 for path, _ in map(find_checkpoint, folders_of(self.folder / name)))

    def reached(self, name: str) -> int:
        """The last step that a run logged."""
        return max((record["step"] for record in self.metrics(name)), default=0)

    def recovers(self, name: str, options: Sequence[str] = ()) -> bool:
        """Whether the run, started once more and not disturbed, ends with the metrics of the undisturbed one."""
        return self.run(name, options=options) == 0 and self.metrics(name) == self.undisturbed

    def stop_halfway(self, name: str) -> Path:
        """A run that SIGTERM stops in the middle; its newest checkpoint."""
        if self.run(name, SignalAt(signal.SIGTERM, "step", STEPS // 2)) != STOPPED:
            raise SystemExit(
                f"SIGTERM did not end in status {STOPPED}: {(self.folder / f'{name}.log').read_text(encoding='utf-8')}"
            )
        return list_checkpoints(self.folder / name / CHECKPOINTS)[-1]


class Kill(NamedTuple):
    """A planned SIGKILL: at a random moment, or before a phase of a save of `rank`; to that rank alone, or to all."""

    phase: str | None
    rank: int
    all: bool

    def text(self, ranks: int) -> str:
        """The kill in the words of the table."""
        when = "at a random moment" if self.phase is None else f"before: {self.phase}"
        return when if ranks == 1 else f"{'all ranks' if self.all else 'one rank'} {when}"


def planned_kills(ranks: int, generator: random.Random) -> Iterator[Kill]:
    """Half of them at random moments, half in the phases of a save; with several ranks one rank and all in turn."""
    for everybody in itertools.cycle((False, True) if ranks > 1 else (True,)):
        for phase in PHASES:
            yield Kill(None, generator.randrange(ranks), everybody)
            yield Kill(phase, generator.randrange(ranks) if phase in RANK_PHASES else 0, everybody)


def kills(laboratory: Laboratory, planned: Iterable[Kill], generator: random.Random) -> list[Row]:
    """Kills of one run after another: at random moments, and inside each phase of a save."""
    lost: dict[str, list[int]] = defaultdict(list)
    wrong, runs, name = 0, 0, "killed-0"
    start = time.perf_counter()
    laboratory.run("timed")
    typical = time.perf_counter() - start  # seconds of a whole run

    def strike(kill: Kill) -> bool:
        """Start the run and kill it as planned; returns whether the kill came before the run was done."""
        rest = signal.SIGKILL if kill.all else signal.SIGTERM
        if kill.phase is None:
            pids = laboratory.start(name, Hooks())
            time.sleep(generator.uniform(0, typical * (1 - laboratory.saved(name) / STEPS)))
            os.kill(pids[kill.rank], signal.SIGKILL)
        else:
            pids = laboratory.start(name, SignalAt(signal.SIGKILL, kill.phase, generator.randint(1, 3), kill.rank))
        return laboratory.wait(pids, rest) != 0

    for kill in planned:
        while not strike(kill):  # the run is done: it must be right, and a new one begins
            wrong += laboratory.metrics(name) != laboratory.undisturbed
            runs, name = runs + 1, f"killed-{runs + 1}"
        lost[kill.text(laboratory.ranks)].append(max(0, laboratory.reached(name) - laboratory.saved(name)))
    wrong += not laboratory.recovers(name)
    verdict = "losses as undisturbed, bit for bit" if not wrong else f"{wrong} of {runs + 1} runs WRONG"
    return [
        Row(f"SIGKILL {when}", len(steps), 0 if wrong else len(steps), f"at most {max(steps)} steps taken again; {verdict}")
        for when, steps in sorted(lost.items())
    ]


def flip_byte(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage(laboratory: Laboratory) -> list[Row]:
    """A damaged newest checkpoint: the run must name the file, and resume from the checkpoint before."""
    faults: dict[str, Callable[[Path], None]] = {
        "file cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
        "byte flipped": flip_byte,
        "file missing": lambda path: path.unlink(),
    }
    newest = laboratory.stop_halfway("halfway")
    rows, halfway, files = [], newest.parent.parent, [*checkpoint_files(newest), MANIFEST]
    for fault, harm in faults.items():
        survived = 0
        for number, file in enumerate(files):
            name = f"damaged-{fault.replace(' ', '-')}-{number}"
            shutil.copytree(halfway, laboratory.folder / name)
            harm(list_checkpoints(laboratory.folder / name / CHECKPOINTS)[-1] / file)
            recovered, log = laboratory.recovers(name), (laboratory.folder / f"{name}.log").read_text(encoding="utf-8")
            named = newest.name in log and (file in log or file == MANIFEST)  # a damaged manifest may blame another file
            survived += recovered and named
        rows.append(Row(fault, len(files), survived, "named it, and went back to the checkpoint before"))
    return rows


def stops(laboratory: Laboratory) -> list[Row]:
    """Signals in training, in evaluation and while a checkpoint is written: the run saves, stops and loses nothing."""
    rows = []
    last = laboratory.ranks - 1
    for fault, hooks in (
        ("SIGTERM in training", SignalAt(signal.SIGTERM, "step", 7, last)),
        ("SIGINT in training", SignalAt(signal.SIGINT, "step", 8, last)),
        ("SIGTERM in evaluation", SignalAt(signal.SIGTERM, "evaluation", 1, last)),
        ("SIGUSR1 while saving", SignalAt(signal.SIGUSR1, "weights", 1, last)),
    ):
        name = fault.replace(" ", "-")
        status = laboratory.run(name, hooks)
        lost = laboratory.reached(name) - laboratory.saved(name)
        survived = status == STOPPED and lost == 0 and laboratory.recovers(name)
        rows.append(Row(fault, 1, int(survived), f"status {status}, {lost} steps lost"))
    return rows


def disk(laboratory: Laboratory, fault: str, name: str, hooks: Hooks, options: Sequence[str] = (), expected: int = 2) -> Row:
    """A disk that takes no checkpoint: the run must go to its end with the status `expected`; and the last whole checkpoint must
    stay or, with `expected` 0, newer ones must be in a second folder."""
    before = laboratory.saved(name)
    status = laboratory.run(name, hooks, options)
    now = laboratory.saved(name)
    kept = now > before if expected == 0 else now == before
    return Row(fault, 1, int(status == expected and kept), f"status {status}, last whole checkpoint kept: {kept}")


def without_permission(laboratory: Laboratory) -> list[Row]:
    """One rank may not write; then the folder of checkpoints is read-only for all, without and with a second folder."""
    laboratory.stop_halfway("refused")
    rows = [disk(laboratory, "no permission to write, one rank", "refused", NoPermission(laboratory.ranks))]
    second = [f"checkpoint.fallback_dir={laboratory.folder / 'second'}"]
    with read_only(laboratory.folder / "refused" / CHECKPOINTS) as permitted:
        if permitted:
            rows.append(disk(laboratory, "read-only folder", "refused", Hooks()))
            rows.append(disk(laboratory, "read-only folder, second folder", "refused", Hooks(), second, expected=0))
    recovers = laboratory.recovers("refused", second)  # where its newest checkpoint may be
    return [row._replace(survived=row.survived * recovers) for row in rows]


def small_disks(laboratory: Laboratory) -> list[Row]:
    """A real disk that is filled: at its end the run waits for room, stops without it, or writes to a second folder."""
    rows = []
    with small_disk(laboratory.folder / "small") as mounted:
        if not mounted:
            laboratory.stop_halfway("full")
            row = disk(laboratory, "no space left (a limit on files)", "full", FullDisk())
            return [row._replace(survived=row.survived * laboratory.recovers("full"))]
        for fault, name, options, expected in (
            ("disk filled, and no room made", "small/unrelieved", ["checkpoint.patience=0"], 2),
            ("disk filled, room made while it waits", "small/relieved", ["checkpoint.patience=60"], 0),
            ("disk filled, second folder", "small/second", [f"checkpoint.fallback_dir={laboratory.folder / 'second'}"], 0),
        ):
            pids = laboratory.start(name, Filled(laboratory.folder / "small"), options)
            events = laboratory.folder / name / "events.jsonl"
            if name == "small/relieved":
                while '"waiting"' not in (events.read_text(encoding="utf-8") if events.exists() else ""):
                    time.sleep(0.05)
                (laboratory.folder / "small" / "filling").unlink()
            status = laboratory.wait(pids)
            (laboratory.folder / "small" / "filling").unlink(missing_ok=True)
            kept = laboratory.saved(name) > 0
            survived = status == expected and kept and laboratory.recovers(name, options)
            rows.append(Row(fault, 1, int(survived), f"status {status}, last whole checkpoint kept: {kept}"))
            shutil.rmtree(laboratory.folder / name)
    return rows


def bad_gradients(laboratory: Laboratory) -> list[Row]:
    """NaN in one gradient: that step alone is skipped. NaN in all of them: the run stops, the last good checkpoint stays."""
    status = laboratory.run("nan", BadGradients(range(10, 11)))
    records, expected = laboratory.metrics("nan"), laboratory.undisturbed
    before = [record for record in expected if record["step"] < 10]
    without = [record["step"] for record in records if record.get("loss", 0.0) is None]  # no healthy step in the window
    once = status == 0 and records[: len(before)] == before and without == [10]
    once = once and [record["step"] for record in records] == [record["step"] for record in expected]
    status = laboratory.run("nans", BadGradients(range(10, 1000)))
    kept = laboratory.saved("nans") > 0
    always = status == 2 and kept and laboratory.run("nans") == 0 and laboratory.reached("nans") == STEPS
    return [
        Row("NaN in one gradient", 1, int(once), "one step skipped, no step missing from the metrics"),
        Row("NaN in every gradient", 1, int(always), f"status {status} after max_bad_steps, last good checkpoint loads"),
    ]


def main(argv: list[str] | None = None) -> int:
    """Print the table of faults; status 1 if anything was not survived."""
    usage = "%(prog)s [section.key=value ...] [--kills N] [--seed N] [--dir DIR] [--ranks N] [--faults KIND ...]"
    parser = argparse.ArgumentParser(prog="python -m launch.torture", usage=usage, description=__doc__)
    kills_help = "SIGKILLs in all, half of them at random moments and half in the phases of a save (50)"
    parser.add_argument("--kills", type=at_least(0), default=50, help=kills_help)
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the random moments (0)")
    parser.add_argument("--dir", help="where to work: a folder on the file system to be tested (a temporary one)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options of the disturbed run")
    parser.add_argument("--ranks", type=at_least(1), default=1, help="processes of a run (1)")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS, help="only these kinds (all)")
    args = parser.parse_intermixed_args(argv)
    try:
        Path(args.dir or tempfile.gettempdir()).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="torture-", dir=args.dir))
    except OSError as error:
        parser.error(f"--dir {args.dir}: {error.strerror}")
    laboratory = Laboratory(folder, args.overrides, args.ranks)
    print(f"{'fault':52}{'injected':>9}{'survived':>9}  what was lost")
    rows: list[Row] = []
    generator = random.Random(args.seed)
    kinds: dict[str, Callable[[], list[Row]]] = {
        "kills": lambda: kills(laboratory, itertools.islice(planned_kills(args.ranks, generator), args.kills), generator),
        "damage": lambda: damage(laboratory),
        "signals": lambda: stops(laboratory),
        "disks": lambda: [*small_disks(laboratory), *without_permission(laboratory)],
        "gradients": lambda: bad_gradients(laboratory),
    }
    for kind in args.faults:
        found = kinds[kind]()
        for row in found:
            print(f"{row.fault:52}{row.injected:>9}{row.survived:>9}  {row.lost}", flush=True)
        rows += found
    injected, survived = sum(row.injected for row in rows), sum(row.survived for row in rows)
    print(f"{'in all':52}{injected:>9}{survived:>9}")
    if injected == survived:
        shutil.rmtree(folder)
        return 0
    print(f"the runs are kept in {folder}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
