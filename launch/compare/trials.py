"""Trials: ordinary runs of train.py in folders of their own, run in parallel, resumed and reused."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from configs.load import ConfigError, load_config
from configs.schema import Config, Optimizer
from data.files import no_link
from launch.checkpoint.folders import CHECKPOINTS
from launch.compare.curves import Outcome, rule_of_run, standing, stopped_diverged
from launch.monitoring.signals import INTERRUPTED, STOPPED
from launch.monitoring.trackers import flat
from launch.optimizers.table import decays, entry_of
from launch.run.agreement import RULE_FILE

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.2
# Options that may differ between a trial and the same trial today: where it lies and how it is kept, not what it computes.
INCIDENTAL = (
    "run.dir", "run.name", "data.cache_", "distributed.timeout", "checkpoint.",
    "log.trackers", "log.project", "log.group", "log.sample_", "log.memory_snapshot",
)  # fmt: skip


class TrialError(RuntimeError):
    """A trial that failed for another reason than its numbers; the message names its log."""


class Stopped(Exception):
    """A signal stopped the comparison; all trials are saved."""


@dataclass(frozen=True)
class Trial:
    """One run of one optimizer with one learning rate and one seed."""

    label: str
    folder: Path
    file: str  # the comparison's configuration
    overrides: tuple[str, ...]  # all that differs from it
    keep: bool = True  # whether its checkpoints stay when it is finished
    rule: str | None = None  # `rule_hash` of the optimizer's rule, if it has one

    @property
    def command(self) -> str:
        """What a person types to run it again."""
        return shlex.join(["python", "train.py", self.file, *self.overrides])

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        return load_config(self.file, self.overrides)


def outcome(trial: Trial) -> Outcome:
    """The status of a trial, from its folder.

    Raises:
        ConfigError: the folder holds a run of another configuration, or with another rule, naming the difference.
        RuleError: its copy of the rule is damaged.
    """
    if not (trial.folder / "config.yaml").exists():
        return Outcome("new")
    config = trial.config
    before, now = (flat(asdict(c)) for c in (load_config(trial.folder / "config.yaml"), config))
    for key in now:
        if before.get(key) != now[key] and not key.startswith((*INCIDENTAL, *without_effect(config.optimizer))):
            raise ConfigError(
                f"{trial.folder} holds a run with {key}={before.get(key)}, this comparison has {now[key]}: choose another --out"
            )
    if trial.rule is not None and rule_of_run(trial.folder) not in (None, trial.rule):
        raise ConfigError(
            f"{trial.folder} holds a run with another rule than {config.optimizer.rule or config.optimizer.name} now is: choose "
            f"another --out, or bring back that rule, of which the folder has a copy ({RULE_FILE})"
        )
    return standing(trial.folder, config)


def without_effect(config: Optimizer) -> list[str]:
    """Options without effect on an optimizer; trials of an earlier version may have them."""
    idle = [] if decays(config) else ["optimizer.weight_decay", "optimizer.cautious_weight_decay"]
    return [*idle, *(["optimizer.base_width"] if entry_of(config).width_rule == "none" else [])]


def visible_devices() -> list[str | None]:
    """The GPUs that trials may use, as CUDA_VISIBLE_DEVICES names them; [None] without any."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        return [None]
    return [d for d in named.split(",") if d] if named else [str(i) for i in range(torch.cuda.device_count())]


class Running(NamedTuple):
    """A trial and its process."""

    trial: Trial
    process: subprocess.Popen
    slot: int
    log: IO[bytes]


class Pool:
    """Runs trials, `parallel` at a time, one GPU each where there are any; a context manager that holds the signal handlers.

    The pool passes on SIGINT and SIGTERM: the trials save and end, and `run` raises `Stopped`. A second SIGINT kills them.
    """

    def __init__(self, parallel: int | None = None) -> None:
        self.devices = visible_devices()
        self.parallel = parallel or len(self.devices)
        self.running: list[Running] = []
        self.signals: list[int] = []
        console = Console(file=sys.stdout)
        text = TextColumn("{task.description}", markup=False)
        bar = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[text]}", markup=False), TimeRemainingColumn())
        self.display = Progress(text, *bar, console=console, disable=not console.is_terminal)

    def __enter__(self) -> Pool:
        self.previous = {n: signal.signal(n, self._receive) for n in (signal.SIGINT, signal.SIGTERM)}
        self.display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self.display.stop()
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object = None) -> None:
        self.signals.append(number)
        again = self.signals.count(signal.SIGINT) > 1
        for running in self.running:
            running.process.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    def _end(self) -> None:
        for running in self.running:
            running.process.terminate()
        for running in self.running:
            running.process.wait()
            running.log.close()
        self.running = []

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.display.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def run(self, phase: str, trials: Sequence[Trial]) -> list[Outcome]:
        """Run the trials that are not finished; returns the outcome of each.

        Raises:
            ConfigError: a folder holds another run.
            TrialError: a trial failed; the others have saved and stopped.
            Stopped: after a signal, when all trials are saved.
        """
        outcomes = [outcome(trial) for trial in trials]
        waiting = [t for t, o in zip(trials, outcomes, strict=True) if o.status in ("new", "unfinished")]
        reused = len(trials) - len(waiting)
        self.say(f"{phase}: {len(trials)} trials" + (f", {reused} of them done already" if reused else ""))
        total = self.display.add_task(phase, total=len(trials), completed=reused, text="trials")
        bars: dict[Trial, TaskID] = {}
        while self.running or (waiting and not self.signals):
            while waiting and len(self.running) < self.parallel and not self.signals:
                trial = waiting.pop(0)
                self.running.append(self._start(trial))
                bars[trial] = self.display.add_task(f"  {name_of(trial)}", total=trial.config.train.steps, text="starting")
            for running in list(self.running):
                trial = running.trial
                self.display.update(bars[trial], **progress(trial.folder))
                if running.process.poll() is not None:
                    self.running.remove(running)
                    running.log.close()
                    self.display.remove_task(bars.pop(trial))
                    self.say(f"  {name_of(trial)}: {self._finish(running)}")
                    self.display.advance(total)
            time.sleep(POLL_SECONDS)
        self.display.remove_task(total)
        if self.signals:
            raise Stopped
        return [outcome(trial) for trial in trials]

    def _start(self, trial: Trial) -> Running:
        slot = next(i for i in range(self.parallel) if all(r.slot != i for r in self.running))
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.parallel)), **os.environ}
        device = self.devices[slot % len(self.devices)]
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        trial.folder.mkdir(parents=True, exist_ok=True)
        log = open(trial.folder / "log.txt", "ab", opener=no_link)  # noqa: SIM115 - the process keeps it
        try:  # through its output, the trial holds this lock until it ends, even if this process is killed before
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            raise TrialError(f"{trial.folder} is being run by another process: wait for it, or stop it") from None
        command = [sys.executable, str(ROOT / "train.py"), trial.file, *trial.overrides]
        # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        return Running(trial, process, slot, log)

    def _finish(self, running: Running) -> str:
        """What became of a trial whose process has ended, in words."""
        trial, status = running.trial, running.process.returncode
        if status == STOPPED or (self.signals and (status < 0 or status == INTERRUPTED)):
            if not self.signals:
                self._receive(signal.SIGTERM)  # someone else, such as a cluster, stopped it: stop all
            return "stopped by a signal, saved"
        if status == 0:
            result = outcome(trial)
            if not trial.keep:
                shutil.rmtree(trial.folder / CHECKPOINTS, ignore_errors=True)
            return f"validation loss {result.loss:.4f}" if result.status == "finished" else "diverged"
        lines = [
            line for line in (trial.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        reason = lines[-1] if lines else "it printed nothing"
        if stopped_diverged(trial.folder):
            return f"diverged ({reason})"
        self._end()
        raise TrialError(f"{trial.folder} failed with status {status}: {reason} (all of it: {trial.folder / 'log.txt'})")


def name_of(trial: Trial) -> str:
    """A trial in the words of its folders."""
    return f"{trial.folder.parent.name}/{trial.folder.name}"


def progress(folder: Path) -> dict:
    """How far a run is, for its bar, from the end of its metrics."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and record.get("loss") is not None:
            return {"completed": record["step"], "text": f"loss {record['loss']:.4f}"}
    return {}
