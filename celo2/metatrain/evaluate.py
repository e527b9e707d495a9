"""`python -m celo2.metatrain.evaluate RULE ... --text FILE`: rules against AdamW, Muon and hand-set rules on unseen tasks.

Every optimizer gets the same search: each learning rate of its grid of four with one seed, then the best with the other seeds.
What is reported is the mean and the standard deviation over those other seeds. Each run is a line of `--out`; a second
command with the same file adds what is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from celo2.metatrain.config import MetatrainError
from celo2.metatrain.evaluation.suite import BASELINES, TASKS, grid, read_images, read_text, train
from celo2.weights import RuleError, load_rule

SEARCH_SEED = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(prog="python -m celo2.metatrain.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("rules", nargs="*", metavar="RULE", help="names or files of rules")
    parser.add_argument("--tasks", default="gpt", help=f"comma-separated: {', '.join(TASKS)} (default: gpt)")
    parser.add_argument("--text", help="text for the language models: a text file, .jsonl or .jsonl.gz with `text`")
    parser.add_argument("--images", default="digits", help="images for the others, as in meta-training (default: digits)")
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: 400)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds beside the one of the search (default: 3)")
    parser.add_argument("--baselines", default=",".join(BASELINES), help=f"comma-separated (default: {','.join(BASELINES)})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (what is there)")
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
    if options.seeds < 1 or options.steps < 1:
        raise MetatrainError("--seeds and --steps must be at least 1")
    kinds = {TASKS[name].data for name in tasks}
    if "text" in kinds and not options.text:
        raise MetatrainError("language models need --text FILE")
    data = {kind: read_text(options.text) if kind == "text" else read_images(options.images) for kind in sorted(kinds)}
    runs = Runs(Path(options.out))
    console = Console(file=sys.stdout)
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        total = sum(len(grid(name)) + options.seeds for name in optimizers) * len(tasks)
        progress = bar.add_task("", total=total)

        def loss(task: str, optimizer: str, lr: float, seed: int) -> float:
            source = options.text if TASKS[task].data == "text" else options.images
            key = {"task": task, "data": source, "steps": options.steps, "optimizer": optimizer, "lr": lr, "seed": seed}
            key["device"] = options.device
            bar.update(progress, description=f"{task} {optimizer} lr {lr:g} seed {seed}")
            result = runs.find(key)
            if result is None:
                result = train(TASKS[task], data[TASKS[task].data], optimizer, lr, seed, options.steps, options.device)
                runs.add(key | result)
            bar.advance(progress)
            return float(result["loss"])

        rows = []
        for task in tasks:
            for optimizer in optimizers:
                search = {lr: loss(task, optimizer, lr, SEARCH_SEED) for lr in grid(optimizer)}
                best = min(search, key=search.__getitem__)
                seeds = range(SEARCH_SEED + 1, SEARCH_SEED + 1 + options.seeds)
                rows.append((task, optimizer, best, [loss(task, optimizer, best, seed) for seed in seeds]))
    print(table(rows, options.steps))


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


def table(rows: Sequence[tuple[str, str, float, list[float]]], steps: int) -> str:
    """A Markdown table: validation loss, mean ± standard deviation over seeds; an lr at the edge of its grid is marked."""
    lines = [f"| task ({steps} steps) | optimizer | lr | validation loss | n |", "|---|---|---|---|---|"]
    for task, optimizer, lr, losses in rows:
        edge = "" if grid(optimizer)[0] < lr < grid(optimizer)[-1] else " (edge)"
        spread = statistics.stdev(losses) if len(losses) > 1 else float("nan")
        lines.append(f"| {task} | {optimizer} | {lr:g}{edge} | {statistics.mean(losses):.4f} ± {spread:.4f} | {len(losses)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
