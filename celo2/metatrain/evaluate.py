"""`python -m celo2.metatrain.evaluate RULE ... --text FILE`: rules against AdamW, Muon and hand-set rules on unseen tasks.

Every optimizer gets the same search: as many learning rates with the first seeds (`next_lr`), then the best with others.
What is reported is the mean and the standard deviation over those others. Each run is a line of `--out`; a second
command with the same file adds what is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from celo2.metatrain.config import MetatrainError
from celo2.metatrain.evaluation.suite import ADAMW_LR, BASELINES, TASKS, first_lr, read_images, read_text, train
from celo2.rule_files import RuleError, load_rule

REFERENCE = "hand-momentum"  # what a learned rule must be held against


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(prog="python -m celo2.metatrain.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("rules", nargs="*", metavar="RULE", help="names or files of rules")
    parser.add_argument("--tasks", default="gpt", help=f"comma-separated: {', '.join(TASKS)} (default: gpt)")
    parser.add_argument("--text", help="text for the language models: a text file, .jsonl or .jsonl.gz with `text`")
    parser.add_argument("--images", default="digits", help="images for the others, as in meta-training (default: digits)")
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: 400)")
    parser.add_argument("--trials", type=int, default=6, help="learning rates that are tried for every optimizer (default: 6)")
    parser.add_argument("--search-steps", type=int, help="training steps of the search (default: as --steps)")
    parser.add_argument("--search-seeds", type=int, default=1, help="seeds of each of them, their mean counts (default: 1)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds beside those of the search (default: 3)")
    parser.add_argument(
        "--adamw-lr", type=float, default=ADAMW_LR, help=f"of embeddings, heads and vectors, under AdamW (default: {ADAMW_LR:g})"
    )
    parser.add_argument("--baselines", default=",".join(BASELINES), help=f"comma-separated (default: {','.join(BASELINES)})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (what is there)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="bf16: autocast (default: fp32)")
    parser.add_argument("--out", default="evaluation.jsonl", help="one line per run (default: evaluation.jsonl)")
    options = parser.parse_args(arguments)
    try:
        evaluate(options)
    except (MetatrainError, RuleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate(options: argparse.Namespace) -> None:
    """The search and the seeds of every optimizer on every task."""
    tasks = [name for name in options.tasks.split(",") if name]
    optimizers = [name for name in options.baselines.split(",") if name] + options.rules
    for name in tasks:
        if name not in TASKS:
            raise MetatrainError(f"task '{name}': expected one of {', '.join(TASKS)}")
    for name in optimizers:
        if name not in BASELINES:
            load_rule(name)
    if options.device not in ("cpu", "cuda") or (options.device == "cuda" and not torch.cuda.is_available()):
        raise MetatrainError(f"--device {options.device}: expected cpu or a cuda that is there")
    search_steps = options.steps if options.search_steps is None else options.search_steps
    if min(options.seeds, options.steps, options.trials, options.search_seeds, search_steps) < 1:
        raise MetatrainError("--seeds, --steps, --trials, --search-seeds and --search-steps must be at least 1")
    if not (math.isfinite(options.adamw_lr) and options.adamw_lr >= 0):
        raise MetatrainError(f"--adamw-lr {options.adamw_lr}: expected at least 0")
    kinds = {TASKS[name].data for name in tasks}
    if "text" in kinds and not options.text:
        raise MetatrainError("language models need --text FILE")
    data = {kind: read_text(options.text) if kind == "text" else read_images(options.images) for kind in sorted(kinds)}
    runs = Runs(Path(options.out))
    console = Console(file=sys.stdout)
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    each = options.trials * options.search_seeds + options.seeds
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        progress = bar.add_task("", total=each * len(optimizers) * len(tasks))

        def loss(task: str, optimizer: str, lr: float, seed: int, steps: int) -> float:
            source = options.text if TASKS[task].data == "text" else options.images
            key = {"task": task, "data": source, "steps": steps, "optimizer": optimizer, "lr": lr, "seed": seed}
            key |= {"adamw_lr": options.adamw_lr, "device": options.device, "precision": options.precision}
            bar.update(progress, description=f"{task} {optimizer} lr {lr:g} seed {seed}")
            result = runs.find(key)
            if result is None:
                how = options.device, options.precision, options.adamw_lr
                result = train(TASKS[task], data[TASKS[task].data], optimizer, lr, seed, steps, *how)
                runs.add(key | result)
            bar.advance(progress)
            return float(result["loss"])

        rows = []
        for task in tasks:
            for optimizer in optimizers:
                found: dict[float, float] = {}
                while len(found) < options.trials:
                    lr = next_lr(found, first_lr(optimizer))
                    tried = [loss(task, optimizer, lr, seed, search_steps) for seed in range(options.search_seeds)]
                    found[lr] = statistics.fmean(tried)
                best = min(sorted(found), key=found.__getitem__)
                seeds = range(options.search_seeds, options.search_seeds + options.seeds)
                losses = [loss(task, optimizer, best, seed, options.steps) for seed in seeds]
                rows.append(Row(task, optimizer, best, best in (min(found), max(found)), losses))
    print(table(rows, options.steps))


def next_lr(found: dict[float, float], first: float) -> float:
    """The learning rate to try next: first, its double and its half, then beyond the best while that is the largest or the
    smallest, else between the best and its neighbours.

    Args:
        found: the loss of every learning rate tried so far.
        first: where to begin.
    """
    for lr in (first, 2 * first, first / 2):
        if lr not in found:
            return lr
    lrs = sorted(found)
    best = lrs.index(min(lrs, key=found.__getitem__))
    if best == 0:
        return lrs[0] / 2
    if best == len(lrs) - 1:
        return lrs[-1] * 2
    wider = best if lrs[best + 1] / lrs[best] >= lrs[best] / lrs[best - 1] else best - 1
    return math.sqrt(lrs[wider] * lrs[wider + 1])


class Row(NamedTuple):
    """What became of one optimizer on one task: its best learning rate, at the edge of those tried or not, a loss per seed."""

    task: str
    optimizer: str
    lr: float
    edge: bool
    losses: list[float]


class Runs:
    """The finished runs in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            lines = path.read_text().splitlines() if path.exists() else []
            self.records = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise MetatrainError(f"{path}: not a file of runs ({error})") from None

    def find(self, key: dict[str, object]) -> dict[str, object] | None:
        """The record with these values, or None."""
        return next((record for record in self.records if key.items() <= record.items()), None)

    def add(self, record: dict[str, object]) -> None:
        """Append a record."""
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def table(rows: Sequence[Row], steps: int) -> str:
    """A Markdown table: validation loss, and its difference to `REFERENCE` seed by seed, mean ± standard deviation over seeds."""
    reference = {row.task: row.losses for row in rows if row.optimizer == REFERENCE}
    lines = [f"| task ({steps} steps) | optimizer | lr | validation loss | minus {REFERENCE} | n |", "|---|---|---|---|---|---|"]
    for row in rows:
        lr = f"{row.lr:.3g}{' (edge)' if row.edge else ''}"
        difference = ""
        if row.task in reference and row.optimizer != REFERENCE:
            difference = spread([a - b for a, b in zip(row.losses, reference[row.task], strict=True)], sign="+")
        lines.append(f"| {row.task} | {row.optimizer} | {lr} | {spread(row.losses)} | {difference} | {len(row.losses)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
    return f"{statistics.mean(values):{sign}.4f} ± {deviation:.4f}"


if __name__ == "__main__":
    sys.exit(main())
