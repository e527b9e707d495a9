"""`python -m launch.torture`: fault injection. Kills, damage, full disks and bad gradients: does a run survive them?

A small run is trained once without disturbance; its losses are the truth. Then the same run is started again and again, is
killed with SIGKILL at random moments and inside each phase of a save, and continues each time by itself; at the end every line
of its metrics must equal the truth, bit for bit. The other faults have a check of their own. Every run is a forked process of
this one, so that a start takes no imports; run it on the machine and file system that your own runs use.
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
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

import train
from data.prepare import prepare
from launch.checkpoint import save as checkpoint
from launch.checkpoint.save import find_checkpoint, list_checkpoints
from launch.distributed.strategy import Strategy
from launch.monitoring.guard import STOPPED
from launch.monitoring.metrics import read_metrics

STEPS = 60
OPTIONS = [
    "model.layers=2",
    "model.width=32",
    "model.heads=2",
    "model.context=32",
    "model.dropout=0.1",
    f"train.steps={STEPS}",
    "train.batch_size=8",
    "train.micro_batch_size=4",
    "optimizer.lr=5e-3",
    "checkpoint.every=3",
    "log.every=1",
    "log.sample_tokens=0",
    "eval.every=5",
    "eval.sequences=16",
]
# The calls of a save before which a process is killed: each opens a phase.
PHASES = {
    "before the temporary folder": (Path, "mkdir"),
    "before the weights": (checkpoint, "save_file"),
    "before the manifest's hashes": (checkpoint, "sha256"),
    "before the flush to disk": (checkpoint, "flush"),
    "before the rename": (Path, "rename"),
    "before old checkpoints go": (checkpoint, "list_checkpoints"),
}


class Bench:
    """A prepared data set, the undisturbed run, and a way to start runs in processes of their own."""

    def __init__(self, folder: Path, options: list[str]) -> None:
        self.folder, self.options = folder, options
        words = (train.__doc__ + checkpoint.__doc__).split()
        texts = [" ".join(words[i % len(words)] for i in range(n, n * 7 + 80)) for n in range(1, 21)]
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        with open(os.devnull, "w") as quiet:
            source, out = str(folder / "text.jsonl"), folder / "data"
            prepare(source, out, tokenizer="bytes", val_fraction=0.2, workers=1, log=lambda line: print(line, file=quiet))
        (folder / "config.yaml").write_text("run: {name: torture}\n")
        if self.wait(self.start("truth")) != 0:
            raise SystemExit(f"the undisturbed run failed: {(folder / 'truth.log').read_text()}")
        self.truth = self.metrics("truth")

    def start(self, name: str, *extra: str, fault: Callable[[], None] = lambda: None) -> int:
        """Fork a run into the folder `name`, with `fault` set up inside it; returns its process id."""
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            log = os.open(self.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            AcceleratorState._reset_state(reset_partial_state=True)
            torch.set_num_threads(1)
            fault()
            dirs = [f"data.dir={self.folder / 'data'}", f"run.dir={self.folder / name}"]
            status = train.main([str(self.folder / "config.yaml"), *dirs, *self.options, *extra])
        finally:
            sys.stdout.flush()
            os._exit(status)

    def wait(self, pid: int) -> int:
        """Exit status of a run; minus the signal that killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def metrics(self, name: str) -> list[dict]:
        """What a run logged, without the clock's columns."""
        clock = ("seconds", "tokens_per_second", "optimizer_seconds")
        records = read_metrics(self.folder / name / "metrics.jsonl")
        return [{key: value for key, value in record.items() if key not in clock} for record in records]

    def saved(self, name: str) -> int:
        """Step of the newest whole checkpoint, 0 without one."""
        path, _ = find_checkpoint(self.folder / name / "checkpoints")
        return int(path.name[5:]) if path else 0

    def reached(self, name: str) -> int:
        """Last step that a run logged."""
        return max((r["step"] for r in read_metrics(self.folder / name / "metrics.jsonl")), default=0)

    def finishes_as_truth(self, name: str, *extra: str) -> bool:
        """Whether the run, started once more and left alone, ends with the losses of the undisturbed one."""
        return self.wait(self.start(name, *extra)) == 0 and self.metrics(name) == self.truth


def die_before(phase: str, occurrence: int) -> Callable[[], None]:
    """A fault: the process is killed when it enters `phase` of a save for the `occurrence`-th time."""
    owner, name = PHASES[phase]

    def install() -> None:
        real, calls = getattr(owner, name), [0]

        def deadly(*args: object, **kwargs: object) -> object:
            if "step_" in str(args[0]) or name in ("save_file", "list_checkpoints"):
                calls[0] += 1
                if calls[0] == occurrence:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, deadly)

    return install


def kills(bench: Bench, count: int, generator: random.Random) -> list[tuple[str, int, int, str]]:
    """`count` kills of one run after another: at random moments, and inside each phase of a save."""
    rows: dict[str, list[int]] = {"SIGKILL at a random moment": []} | {f"SIGKILL {phase}": [] for phase in PHASES}
    wrong, runs, name = 0, 0, "killed-0"
    typical = timed(lambda: bench.wait(bench.start("timed")))
    turns = itertools.cycle([turn for phase in PHASES for turn in (None, phase)])
    while sum(map(len, rows.values())) < count:
        phase = next(turns)
        fault = die_before(phase, generator.randint(1, 3)) if phase else lambda: None
        pid = bench.start(name, fault=fault)
        if phase is None:
            time.sleep(generator.uniform(0, typical * (1 - bench.saved(name) / STEPS)))
            os.kill(pid, signal.SIGKILL)
        if bench.wait(pid) == 0:  # the run was done before it met its fault: it must be right, and a new one begins
            wrong += bench.metrics(name) != bench.truth
            runs, name = runs + 1, f"killed-{runs + 1}"
            continue
        lost = bench.reached(name) - bench.saved(name)
        rows[f"SIGKILL {phase}" if phase else "SIGKILL at a random moment"].append(max(0, lost))
    wrong += not bench.finishes_as_truth(name)
    verdict = "losses as undisturbed, bit for bit" if not wrong else f"{wrong} of {runs + 1} runs WRONG"
    return [(fault, len(lost), len(lost) if not wrong else 0, f"at most {max(lost)} steps taken again; {verdict}")
            for fault, lost in rows.items() if lost]  # fmt: skip


def timed(action: Callable[[], object]) -> float:
    """Seconds that `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def signal_in_step(number: signal.Signals, step: int) -> Callable[[], None]:
    """A fault: the process gets a signal in the middle of its `step`-th step."""

    def install() -> None:
        real, calls = Strategy.backward, [0]

        def signalled(*args: object) -> object:
            calls[0] += 1
            if calls[0] == step:
                os.kill(os.getpid(), number)
            return real(*args)

        Strategy.backward = signalled

    return install


def half_done(bench: Bench, name: str) -> Path:
    """A run that was stopped by SIGTERM in the middle; its newest checkpoint."""
    pid = bench.start(name, fault=signal_in_step(signal.SIGTERM, STEPS // 2))
    if bench.wait(pid) != STOPPED:
        raise SystemExit(f"SIGTERM did not end in status {STOPPED}: {(bench.folder / f'{name}.log').read_text()}")
    return list_checkpoints(bench.folder / name / "checkpoints")[-1]


def damage(bench: Bench) -> list[tuple[str, int, int, str]]:
    """A damaged newest checkpoint: the one before it is taken."""

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    faults: dict[str, Callable[[Path], None]] = {
        "file cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
        "byte flipped": flip,
        "file missing": lambda path: path.unlink(),
    }
    rows = []
    for fault, harm in faults.items():
        files = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
        survived = 0
        for number, file in enumerate(files):
            name = f"damaged-{fault.replace(' ', '-')}-{number}"
            harm(half_done(bench, name) / file)
            survived += bench.finishes_as_truth(name)
        rows.append((fault, len(files), survived, "went back to the checkpoint before"))
    return rows


def stops(bench: Bench) -> list[tuple[str, int, int, str]]:
    """Signals in training, in evaluation and while a checkpoint is written."""

    def in_evaluation() -> None:
        real = train.evaluate

        def signalled(*args: object) -> object:
            os.kill(os.getpid(), signal.SIGTERM)
            return real(*args)

        train.evaluate = signalled

    def in_save() -> None:
        real = checkpoint.write_checkpoint

        def signalled(*args: object) -> object:
            os.kill(os.getpid(), signal.SIGUSR1)
            return real(*args)

        checkpoint.write_checkpoint = signalled

    rows = []
    for fault, install in (
        ("SIGTERM in training", signal_in_step(signal.SIGTERM, 7)),
        ("SIGINT in training", signal_in_step(signal.SIGINT, 8)),
        ("SIGTERM in evaluation", in_evaluation),
        ("SIGUSR1 while saving", in_save),
    ):
        name = fault.replace(" ", "-")
        status = bench.wait(bench.start(name, fault=install))
        lost = bench.reached(name) - bench.saved(name)
        survived = status == STOPPED and lost == 0 and bench.finishes_as_truth(name)
        rows.append((fault, 1, int(survived), f"status {status}, {lost} steps lost"))
    return rows


def no_space(bench: Bench) -> tuple[str, int, int, str]:
    """Files may not grow beyond a small limit, as on a full disk: the run goes on, and the last whole checkpoint stays."""
    name = "full"
    half_done(bench, name)
    before = bench.saved(name)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    status = bench.wait(bench.start(name, fault=limit))
    kept = bench.saved(name) == before
    survived = status == 2 and kept and bench.finishes_as_truth(name)
    return ("no space left", 1, int(survived), f"status {status}, last whole checkpoint kept: {kept}")


def read_only(bench: Bench) -> tuple[str, int, int, str]:
    """A checkpoint folder that cannot be written into: as on a full disk."""
    name = "readonly"
    half_done(bench, name)
    before = bench.saved(name)

    def forbid() -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        checkpoint.save_file = refuse  # root writes into read-only folders; everybody else gets this error there

    status = bench.wait(bench.start(name, fault=forbid))
    kept = bench.saved(name) == before
    survived = status == 2 and kept and bench.finishes_as_truth(name)
    return ("no permission to write", 1, int(survived), f"status {status}, last whole checkpoint kept: {kept}")


def bad_gradients(bench: Bench) -> list[tuple[str, int, int, str]]:
    """NaN in one gradient: that step alone is skipped. NaN in all of them: the run stops, the last good checkpoint stays."""

    def poison(from_step: int, to_step: int) -> Callable[[], None]:
        def install() -> None:
            real, calls = Strategy.backward, [0]

            def poisoned(strategy: Strategy, *rest: object) -> object:
                loss = real(strategy, *rest)
                calls[0] += 1
                if from_step <= calls[0] < to_step:
                    next(strategy.loss_model.parameters()).grad.fill_(float("nan"))
                return loss

            Strategy.backward = poisoned

        return install

    status = bench.wait(bench.start("nan", fault=poison(10, 11)))
    records, truth = bench.metrics("nan"), bench.truth
    before = [r for r in truth if r["step"] < 10]
    once = status == 0 and records[: len(before)] == before and all(r.get("loss", 0.0) is not None for r in records)
    once = once and [r["step"] for r in records] == [r["step"] for r in truth]
    status = bench.wait(bench.start("nans", fault=poison(10, 1000)))
    path, _ = find_checkpoint(bench.folder / "nans" / "checkpoints")
    always = status == 2 and path is not None and bench.wait(bench.start("nans")) == 0 and bench.reached("nans") == STEPS
    return [
        ("NaN in one gradient", 1, int(once), "one step skipped, no step missing from the metrics"),
        ("NaN in every gradient", 1, int(always), f"status {status} after max_bad_steps, last good checkpoint loads"),
    ]


def main(argv: list[str] | None = None) -> int:
    """Print the table of faults; status 1 if anything was not survived."""
    parser = argparse.ArgumentParser(prog="python -m launch.torture", description=__doc__)
    parser.add_argument(
        "--kills",
        type=int,
        default=50,
        help="SIGKILLs in all, half of them at random moments and half in the phases of a save (50)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--dir", help="where to work: a folder on the file system to be tested (a temporary one)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options of the tortured run")
    args = parser.parse_intermixed_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=args.dir))
    bench = Bench(folder, [*OPTIONS, *args.overrides])
    rows = kills(bench, args.kills, random.Random(args.seed))
    rows += [*damage(bench), *stops(bench), no_space(bench), read_only(bench), *bad_gradients(bench)]
    print(f"{'fault':36}{'injected':>9}{'survived':>9}  what was lost")
    for fault, injected, survived, lost in rows:
        print(f"{fault:36}{injected:>9}{survived:>9}  {lost}")
    injected, survived = (sum(row[column] for row in rows) for column in (1, 2))
    print(f"{'in all':36}{injected:>9}{survived:>9}")
    if injected == survived:
        shutil.rmtree(folder)
        return 0
    print(f"the runs are kept in {folder}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
