"""`python -m celo2.metatrain.evaluate RULE ... --text FILE`: rules against AdamW, Muon and hand-set rules on unseen tasks.

Every optimizer gets the same search: as many learning rates, with the first seeds (`next_lr`). The best one is trained with other
seeds, and the tables tell of those alone. Each training run is a line of `--out`; a second command with the same file adds what
is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy.stats import ttest_1samp

from celo2.metatrain.evaluation.suite import ADAMW_LR, BASELINES, FIRST_LR, TASKS, USUAL_FIRST_LR, images_of, text_of, train
from celo2.rule_files import RuleError, load_rule
from celo2.training.configuration import ConfigError

REFERENCE = "hand-momentum"  # what a learned rule must be held against


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, print the tables."""
    parser = argparse.ArgumentParser(prog="python -m celo2.metatrain.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("rules", nargs="*", metavar="RULE", help="names or files of rules")
    parser.add_argument("--tasks", default="gpt", help=f"comma-separated: {', '.join(TASKS)} (default: gpt)")
    parser.add_argument("--text", help="text for the language models: a text file, .jsonl or .jsonl.gz with `text`")
    parser.add_argument("--images", default="digits", help="images for the others, as in meta-training (default: digits)")
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: 400)")
    parser.add_argument("--trials", type=int, default=6, help="learning rates that are tried for every optimizer (default: 6)")
    parser.add_argument("--search-steps", type=int, help="training steps of the search (default: as --steps)")
    parser.add_argument("--search-seeds", type=int, default=1, help="seeds of the search; their mean decides (default: 1)")
    parser.add_argument("--seeds", type=int, default=3, help="further seeds, which give the results (default: 3)")
    parser.add_argument(
        "--adamw-lr", type=float, default=ADAMW_LR, help=f"AdamW's, for embeddings, heads and vectors (default: {ADAMW_LR:g})"
    )
    parser.add_argument("--baselines", default=",".join(BASELINES), help=f"comma-separated (default: {','.join(BASELINES)})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (what is there)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="bf16: autocast (default: fp32)")
    parser.add_argument("--out", default="evaluation.jsonl", help="file: a line per training run (default: evaluation.jsonl)")
    options = parser.parse_args(arguments)
    options.tasks = [name for name in options.tasks.split(",") if name]
    options.optimizers = [name for name in options.baselines.split(",") if name] + options.rules
    options.search_steps = options.steps if options.search_steps is None else options.search_steps
    try:
        check(options)
        evaluate(options)
    except (ConfigError, RuleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check(options: argparse.Namespace) -> None:
    """Raise ConfigError or RuleError for options that cannot be: now, not after hours of training."""
    for name in options.tasks:
        if name not in TASKS:
            raise ConfigError(f"task '{name}': expected one of {', '.join(TASKS)}")
    for name in options.optimizers:
        if name not in BASELINES:
            load_rule(name)
    if options.device not in ("cpu", "cuda") or (options.device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"--device {options.device}: expected cpu or a cuda that is there")
    if min(options.seeds, options.steps, options.trials, options.search_seeds, options.search_steps) < 1:
        raise ConfigError("--seeds, --steps, --trials, --search-seeds and --search-steps must be at least 1")
    if not (math.isfinite(options.adamw_lr) and options.adamw_lr >= 0):
        raise ConfigError(f"--adamw-lr {options.adamw_lr}: expected at least 0")
    if not options.text and any(TASKS[name].data == "text" for name in options.tasks):
        raise ConfigError("language models need --text FILE")


class Row(NamedTuple):
    """What became of one optimizer on one task: its best learning rate, at the edge of those tried or not, a loss per seed."""

    task: str
    optimizer: str
    lr: float
    edge: bool
    losses: list[float]


def evaluate(options: argparse.Namespace) -> None:
    """Search and train every optimizer on every task, with a progress bar on a terminal."""
    console = Console(file=sys.stdout)
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    each = options.trials * options.search_seeds + options.seeds
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        bar.add_task("", total=each * len(options.optimizers) * len(options.tasks))
        runs = Runs(options, bar)
        rows = [best_of(runs, task, optimizer) for task in options.tasks for optimizer in options.optimizers]
    print(table(rows, options.steps))
    print(f"\n{pairs(rows)}")


def best_of(runs: Runs, task: str, optimizer: str) -> Row:
    """The search for a learning rate, then the best one with other seeds."""
    options = runs.options
    found: dict[float, float] = {}
    while len(found) < options.trials:
        lr = next_lr(found, FIRST_LR.get(optimizer, USUAL_FIRST_LR))
        found[lr] = statistics.fmean(
            runs.loss(task, optimizer, lr, seed, options.search_steps) for seed in range(options.search_seeds)
        )
    best = min(sorted(found), key=found.__getitem__)
    seeds = range(options.search_seeds, options.search_seeds + options.seeds)
    losses = [runs.loss(task, optimizer, best, seed, options.steps) for seed in seeds]
    return Row(task, optimizer, best, best in (min(found), max(found)), losses)


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


class Runs:
    """Training runs. Those that a file of JSON lines holds are not done again."""

    def __init__(self, options: argparse.Namespace, bar: Progress) -> None:
        self.options, self.bar, self.path = options, bar, Path(options.out)
        kinds = {TASKS[name].data for name in options.tasks}
        self.data = {kind: text_of(options.text) if kind == "text" else images_of(options.images) for kind in sorted(kinds)}
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            self.records = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path}: not a file of training runs ({error})") from None

    def loss(self, task: str, optimizer: str, lr: float, seed: int, steps: int) -> float:
        """The validation loss at the end of a training run."""
        options, kind = self.options, TASKS[task].data
        source = options.text if kind == "text" else options.images
        key = {"task": task, "data": source, "steps": steps, "optimizer": optimizer, "lr": lr, "seed": seed}
        key |= {"adamw_lr": options.adamw_lr, "device": options.device, "precision": options.precision}
        self.bar.update(self.bar.task_ids[0], description=f"{task} {optimizer} lr {lr:g} seed {seed}")
        record = next((record for record in self.records if key.items() <= record.items()), None)
        if record is None:
            how = options.device, options.precision, options.adamw_lr
            record = key | train(TASKS[task], self.data[kind], optimizer, lr, seed, steps, *how)
            self.records.append(record)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        self.bar.advance(self.bar.task_ids[0])
        return float(record["loss"])


def table(rows: Sequence[Row], steps: int) -> str:
    """A Markdown table: validation loss, and its difference to `REFERENCE` seed by seed."""
    reference = {row.task: row.losses for row in rows if row.optimizer == REFERENCE}
    lines = [f"| task ({steps} steps) | optimizer | lr | validation loss | minus {REFERENCE} | n |", "|---|---|---|---|---|---|"]
    for row in rows:
        lr = f"{row.lr:.3g}{' (edge)' if row.edge else ''}"
        difference = ""
        if row.task in reference and row.optimizer != REFERENCE:
            difference = spread(differences(row.losses, reference[row.task]), sign="+")
        lines.append(f"| {row.task} | {row.optimizer} | {lr} | {spread(row.losses)} | {difference} | {len(row.losses)} |")
    return "\n".join(lines)


def pairs(rows: Sequence[Row]) -> str:
    """A Markdown table of every pair of optimizers on a task: the difference of their losses seed by seed, and its p."""
    lines = ["| task | pair of optimizers | difference | p | n |", "|---|---|---|---|---|"]
    for a, b in combinations(rows, 2):
        if a.task == b.task:
            found = differences(a.losses, b.losses)
            pair = f"{a.optimizer} minus {b.optimizer}"
            lines.append(f"| {a.task} | {pair} | {spread(found, sign='+')} | {p_value(found)} | {len(found)} |")
    return "\n".join([*lines, "", "mean (standard deviation) over n seeds; p: two-sided t-test of the paired differences"])


def differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """a - b, seed by seed."""
    return [x - y for x, y in zip(a, b, strict=True)]


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean (standard deviation)."""
    deviation = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
    return f"{statistics.mean(values):{sign}.4f} ({deviation:.4f})"


def p_value(values: Sequence[float]) -> str:
    """How likely a mean so far from 0 is by chance; empty where the spread is not known or 0."""
    if not all(map(math.isfinite, values)) or len(set(values)) < 2:
        return ""
    return f"{ttest_1samp(values, 0.0).pvalue:.2g}"


if __name__ == "__main__":
    sys.exit(main())
