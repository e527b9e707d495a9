"""`python -m celo2.metatrain.evaluate RULE ... --text FILE`: compare rules with AdamW, Muon and hand-set rules on unseen tasks.

Every optimizer gets the same search on the first seeds: an equal number of learning rates, or settings of several keys
(`--search`), by the coordinate descent of `launch.compare`. The best setting is trained with other seeds, and the tables show
only these runs. Each training run is a line of `--out`; a second command with the same file adds the missing runs. The file
identifies rules and data by their content, not by their names.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from celo2.metatrain.evaluation.picture import draw
from celo2.metatrain.evaluation.suite import (
    ADAMW_LR,
    BASELINES,
    BY_HAND,
    FIRST_LR,
    FIRST_WEIGHT_DECAY,
    OF_TORCH,
    TASKS,
    USUAL_FIRST_LR,
    VALIDATION_BATCHES,
    WEIGHT_DECAY,
    content_of,
    digest_of,
    images_of,
    optimizer_of,
    text_of,
    train,
)
from celo2.metatrain.problems import FINAL
from celo2.rule import Rule
from celo2.rule_files import RuleError
from celo2.training.configuration import ConfigError
from celo2.training.search import Key, Search, Setting, begin, grid, next_setting, open_sides
from celo2.training.statistics import Difference, difference, holm

KEYS = {"lr": 2.0, "adamw_lr": 4.0, "weight_decay": 4.0}  # keys that can be searched, and the first factor of their searches
FIRST_LRS = 3  # number of values of the first key that a search begins with
REFERENCE = "hand-momentum"  # the baseline for learned rules
RECORD = b'{"task": "'  # the beginning of a line of `--out`


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the missing runs and print the tables. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m celo2.metatrain.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("rules", nargs="*", metavar="RULE", help="names or files of rules")
    parser.add_argument("--tasks", default="gpt", help=f"comma-separated: {', '.join(TASKS)} (default: gpt)")
    parser.add_argument("--text", help="text for the language models: a text file, .jsonl or .jsonl.gz with `text`")
    parser.add_argument("--images", default="digits", help="images for the others, as in meta-training (default: digits)")
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: 400)")
    parser.add_argument(
        "--trials", type=int, default=6, help="number of settings tried for each optimizer; 1: no search (default: 6)"
    )
    parser.add_argument(
        "--lr",
        default="",
        help="learning rate at which the search begins, or without a search the one used, such as 0.004 or 0.004,muon=0.04 "
        "(default: per optimizer)",
    )
    parser.add_argument(
        "--search", default="lr", help=f"comma-separated keys to search together: {', '.join(KEYS)} (default: lr)"
    )
    parser.add_argument("--search-steps", type=int, help="training steps of the search (default: as --steps)")
    parser.add_argument(
        "--search-seeds", type=int, default=1, help="number of seeds of the search; their mean loss decides (default: 1)"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="number of seeds of the final runs, other than those of the search (default: 3)"
    )
    parser.add_argument(
        "--adamw-lr",
        type=float,
        default=ADAMW_LR,
        help=f"AdamW's learning rate of embeddings, heads and vectors (default: {ADAMW_LR:g})",
    )
    parser.add_argument(
        "--weight-decay",
        default="",
        help="weight decay at which the search begins, or without a search the one used, such as 0.1 or 0.1,muon=0.03 "
        "(default: per optimizer)",
    )
    parser.add_argument(
        "--final", type=float, default=FINAL, help=f"final learning rates, as a share of the peak rates (default: {FINAL:g})"
    )
    parser.add_argument(
        "--validation-batches",
        type=int,
        default=VALIDATION_BATCHES,
        help=f"number of batches of the final validation loss (default: {VALIDATION_BATCHES})",
    )
    parser.add_argument("--baselines", default=",".join(BASELINES), help=f"comma-separated (default: {','.join(BASELINES)})")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: cuda if available)"
    )
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="bf16: autocast (default: fp32)")
    parser.add_argument(
        "--out", default="evaluation.jsonl", help="file with one line per training run (default: evaluation.jsonl)"
    )
    parser.add_argument("--picture", metavar="PNG", help="draw the gain over the first optimizer, over the training steps")
    options = parser.parse_args(arguments)
    options.tasks = list(dict.fromkeys(name for name in options.tasks.split(",") if name))  # without repetitions
    options.search = [name for name in options.search.split(",") if name]
    options.baselines = [name for name in options.baselines.split(",") if name]
    options.optimizers = list(dict.fromkeys([*options.baselines, *options.rules]))
    options.search_steps = options.steps if options.search_steps is None else options.search_steps
    try:
        options.lr = by_optimizer("--lr", options.lr, options.optimizers)
        options.weight_decay = by_optimizer("--weight-decay", options.weight_decay, options.optimizers)
        check(options)
        evaluate(options)
    except (ConfigError, RuleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to add the missing runs", file=sys.stderr)
        return 130
    return 0


def check(options: argparse.Namespace) -> None:
    """Raise ConfigError or RuleError for invalid options at once, not after hours of training."""
    if not options.tasks:
        raise ConfigError(f"--tasks is empty, expected some of {', '.join(TASKS)}")
    for name in options.tasks:
        if name not in TASKS:
            raise ConfigError(f"task '{name}': expected one of {', '.join(TASKS)}")
    if not options.optimizers:
        raise ConfigError("nothing to evaluate: name a RULE, or some --baselines")
    for name in options.search or [""]:
        if name not in KEYS or options.search.count(name) > 1:
            raise ConfigError(
                f"--search {','.join(options.search)}: expected one or more, without repetition, of {', '.join(KEYS)}"
            )
    for name in options.optimizers:
        try:
            optimizer = optimizer_of(name)
            if options.search == ["adamw_lr"] and not uses_adamw_lr(optimizer):
                raise ConfigError(f"--search adamw_lr: {name} does not use it, since it trains every parameter itself; add lr")
        except RuleError as error:
            if name not in options.baselines:
                raise
            raise ConfigError(f"--baselines {name}: expected {', '.join((*OF_TORCH, *BY_HAND))}, or a rule ({error})") from None
    if options.device not in ("cpu", "cuda") or (options.device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"--device {options.device}: expected cpu, or cuda on a machine with a GPU")
    for name in ("seeds", "steps", "trials", "search_seeds", "search_steps", "validation_batches"):
        if vars(options)[name] < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {vars(options)[name]}: expected at least 1")
    if 0 in options.lr.values():
        raise ConfigError("--lr 0: expected a number above 0")
    if not (math.isfinite(options.adamw_lr) and options.adamw_lr >= 0):
        raise ConfigError(f"--adamw-lr {options.adamw_lr}: expected at least 0, and finite")
    if 0 in options.weight_decay.values() and "weight_decay" in options.search:
        raise ConfigError("--weight-decay 0: a search of weight_decay multiplies by factors; give a value above 0")
    if options.adamw_lr == 0 and "adamw_lr" in options.search:
        raise ConfigError("--adamw-lr 0: a search of adamw_lr multiplies by factors; give a value above 0")
    if not 0 <= options.final <= 1:
        raise ConfigError(f"--final {options.final}: expected 0 to 1")
    if options.picture and (not options.picture.endswith(".png") or not Path(options.picture).parent.is_dir()):
        raise ConfigError(f"--picture {options.picture}: expected a name that ends in .png, in a folder that exists")
    if options.picture and len(options.optimizers) < 2:
        raise ConfigError(f"--picture {options.picture}: expected two optimizers or more: it draws the gain over the first one")
    out = Path(options.out)
    if not out.parent.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK) or out.is_dir():
        raise ConfigError(f"--out {options.out}: expected a file that can be written, in a folder that exists")
    if not options.text and any(TASKS[name].data == "text" for name in options.tasks):
        raise ConfigError("language models need --text FILE")


def by_optimizer(option: str, text: str, optimizers: Sequence[str]) -> dict[str, float]:
    """The numbers in a text like "0.004,muon=0.04" by optimizer; the key "" holds the number for all other optimizers."""
    found: dict[str, float] = {}
    for part in text.split(",") if text else []:
        name, named, value = part.rpartition("=")
        if named and name not in optimizers:
            raise ConfigError(f"{option} {part}: unknown optimizer '{name}', expected one of {', '.join(optimizers)}")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            raise ConfigError(f"{option} {part or text}: expected a number of at least 0, or OPTIMIZER=NUMBER")
        if name in found:
            raise ConfigError(f"{option} {text}: two numbers for {name or 'all optimizers'}")
        found[name] = number
    return found


def first_of(optimizer: str, asked: Mapping[str, float], own: Mapping[str, float], usual: float) -> float:
    """Where the search for a key begins: the value asked for this optimizer or for all, else its own default or `usual`."""
    return asked.get(optimizer, asked.get("", own.get(optimizer, usual)))


class Row(NamedTuple):
    """The results of one optimizer on one task: its best setting, the keys whose best value is at the edge of the tried ones, and
    for each seed the loss and the curve of training losses."""

    task: str
    optimizer: str
    setting: dict[str, float]
    edges: tuple[str, ...]
    losses: dict[int, float]
    curves: dict[int, list[float]]

    def whole_curves(self) -> dict[int, list[float]]:
        """The curves of the runs that did not diverge, by seed."""
        return {seed: curve for seed, curve in self.curves.items() if math.isfinite(self.losses[seed])}


def evaluate(options: argparse.Namespace) -> None:
    """Search and train every optimizer on every task, with a progress bar on a terminal."""
    console = Console(file=sys.stdout)
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    each = (options.trials * options.search_seeds if options.trials > 1 else 0) + options.seeds
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        bar.add_task("", total=each * len(options.optimizers) * len(options.tasks))
        runs = Runs(options, bar)
        rows = [best_of(runs, task, optimizer) for task in options.tasks for optimizer in options.optimizers]
    print(table(rows, options.steps))
    print(f"\n{pairs(rows)}")
    if options.picture:
        of_tasks = {task: {row.optimizer: row.whole_curves() for row in rows if row.task == task} for task in options.tasks}
        draw(of_tasks, options.steps, Path(options.picture))


def uses_adamw_lr(optimizer: str | Rule) -> bool:
    """Whether AdamW trains some parameters beside this optimizer; a celo2-base rule trains all of them itself."""
    return isinstance(optimizer, str) or optimizer.variant != "celo2-base"


def best_of(runs: Runs, task: str, optimizer: str) -> Row:
    """Search for the best setting of an optimizer on a task, then train this setting with other seeds."""
    options = runs.options
    firsts = {
        "lr": first_of(optimizer, options.lr, FIRST_LR, USUAL_FIRST_LR),
        "adamw_lr": options.adamw_lr,
        "weight_decay": first_of(optimizer, options.weight_decay, FIRST_WEIGHT_DECAY, WEIGHT_DECAY),
    }
    if not uses_adamw_lr(runs.optimizers[optimizer]):
        del firsts["adamw_lr"]
    keys = tuple(Key(name, firsts[name], factor) for name, factor in KEYS.items() if name in options.search and name in firsts)

    def trained(setting: Setting, seeds: range, steps: int) -> dict[int, tuple[float, list[float]]]:
        values = firsts | dict(zip((key.name for key in keys), setting, strict=True))
        return {seed: runs.trained(task, optimizer, values, seed, steps) for seed in seeds}

    def losses(setting: Setting) -> dict[int, float]:
        return {seed: loss for seed, (loss, _) in trained(setting, range(options.search_seeds), options.search_steps).items()}

    chosen: Setting = tuple(key.first for key in keys)
    edges: tuple[str, ...] = ()
    if options.trials > 1:
        s = searched(keys, options.trials, losses)
        chosen = s.chosen or min(s.losses)  # if all runs diverged
        edges = tuple(open_sides(keys, s.tried))
    final = trained(chosen, range(options.search_seeds, options.search_seeds + options.seeds), options.steps)
    values = {name: firsts[name] for name in ("lr", "weight_decay")}  # always shown, as they differ between optimizers
    values |= dict(zip((key.name for key in keys), chosen, strict=True))
    final_losses, curves = {seed: loss for seed, (loss, _) in final.items()}, {seed: curve for seed, (_, curve) in final.items()}
    return Row(task, optimizer, values, edges, final_losses, curves)


def searched(keys: tuple[Key, ...], trials: int, losses: Callable[[Setting], Mapping[int, float]]) -> Search:
    """A search with `trials` trials: first three values of the first key around its start, then one setting at a time."""
    s = Search(keys)
    for setting in begin(keys, grid(keys[0].first, min(FIRST_LRS, trials), keys[0].factor)):
        s.losses[setting] = tuple(losses(setting).values())
    while s.trials < trials and (following := next_setting(keys, s.tried)) is not None:
        s.losses[following] = tuple(losses(following).values())
    return s


class Runs:
    """Training runs. Runs that are in the file of JSON lines are not repeated."""

    def __init__(self, options: argparse.Namespace, bar: Progress) -> None:
        self.options, self.bar, self.path = options, bar, Path(options.out)
        kinds = {TASKS[name].data for name in options.tasks}
        self.data = {kind: text_of(options.text) if kind == "text" else images_of(options.images) for kind in sorted(kinds)}
        self.digests = {kind: digest_of(data) for kind, data in self.data.items()}
        self.optimizers = {name: optimizer_of(name) for name in options.optimizers}  # loaded once: their files may change
        self.contents = {name: content_of(optimizer) for name, optimizer in self.optimizers.items()}
        self.records = read_records(self.path)

    def trained(self, task: str, optimizer: str, values: Mapping[str, float], seed: int, steps: int) -> tuple[float, list[float]]:
        """The final validation loss and the curve of training losses of a run with these values of KEYS; trains if needed."""
        options, kind = self.options, TASKS[task].data
        how: dict[str, Any] = {name: vars(options)[name] for name in ("device", "precision", "final", "validation_batches")}
        how |= {"seed": seed, "steps": steps} | dict(values)
        identity: dict[str, Any] = {"task": task, "data_sha256": self.digests[kind]} | how
        content = self.contents[optimizer]
        identity |= {"optimizer": optimizer} if content is None else {"rule_sha256": content}
        bar = self.bar.task_ids[0]
        self.bar.update(bar, description=f"{task} {optimizer} lr {values['lr']:g} seed {seed}")
        record: dict[str, Any] | None = next((record for record in self.records if identity.items() <= record.items()), None)
        if record is None:
            named = {"optimizer": optimizer, "data": options.text if kind == "text" else options.images}
            record = identity | named | train(TASKS[task], self.data[kind], self.optimizers[optimizer], **how)
            self.records.append(record)
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                says = f"{error.strerror}: fix this and run the same command again; it adds the missing runs"
                raise ConfigError(f"--out {self.path}: {says}") from None
        self.bar.advance(bar)
        return float(record["loss"]), record["curve"]


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the training runs in a file of JSON lines. Removes a last line that a kill cut short from the file; if only its
    newline is missing, adds the newline.

    Lines from before the options `--final` and `--validation-batches` existed get the defaults of these.

    Raises:
        ConfigError: a line is not a training run. Then the file stays unchanged.
    """
    try:
        whole, newline, last = (path.read_bytes() if path.exists() else b"").rpartition(b"\n")
        records = [json.loads(line) for line in whole.splitlines()]
        torn = is_torn(last, RECORD if not records else b"{")
        if last and not torn:
            records.append(json.loads(last))
        if not all(map(is_record, records)):
            raise ValueError("expected an object with a loss and a curve of numbers on every line")
        if torn:
            os.truncate(path, len(whole + newline))
        elif last:
            with path.open("ab") as file:
                file.write(b"\n")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a file of training runs ({error})") from None
    return [{"final": FINAL, "validation_batches": VALIDATION_BATCHES} | record for record in records]


def is_torn(line: bytes, beginning: bytes) -> bool:
    """Whether a line is a record that a kill cut short: it is not valid JSON, and it begins like a record."""
    try:
        json.loads(line)
    except ValueError:
        return bool(line) and (line.startswith(beginning) or beginning.startswith(line))
    return False


def is_record(value: Any) -> bool:
    """Whether a line of the file is a training run, with numbers as its loss and its curve."""
    if not isinstance(value, dict) or not isinstance(value.get("curve"), list):
        return False
    return all(isinstance(number, (int, float)) for number in (value.get("loss"), *value["curve"]))


def table(rows: Sequence[Row], steps: int) -> str:
    """A Markdown table of the validation losses and their differences to `REFERENCE`, seed by seed."""
    reference = {row.task: row.losses for row in rows if row.optimizer == REFERENCE}
    keys = list(dict.fromkeys(key for row in rows for key in row.setting)) or ["lr"]
    lines = [f"| task ({steps} steps) | optimizer | {' | '.join(keys)} | validation loss | minus {REFERENCE} | n |"]
    lines.append("|---" * (5 + len(keys)) + "|")
    for row in rows:
        found = {key: f"{value:.3g}{' (edge)' if key in row.edges else ''}" for key, value in row.setting.items()}
        values = " | ".join(found.get(key, "") for key in keys)
        gap = ""
        if row.task in reference and row.optimizer != REFERENCE:
            gap = spread(gaps(row.losses, reference[row.task]), sign="+")
        lines.append(
            f"| {row.task} | {row.optimizer} | {values} | {spread(list(row.losses.values()))} | {gap} | {len(row.losses)} |"
        )
    return "\n".join(lines)


def pairs(rows: Sequence[Row]) -> str:
    """A Markdown table of every pair of optimizers on a task: the difference of their losses seed by seed, its interval, its p,
    and this p corrected for the number of pairs on the task."""
    lines = ["| task | pair of optimizers | difference | 95 % interval | p | p (Holm) | n |", "|---|---|---|---|---|---|---|"]
    for task in dict.fromkeys(row.task for row in rows):
        compared = list(combinations([row for row in rows if row.task == task], 2))
        found = [tested(a.losses, b.losses) for a, b in compared]
        for (a, b), gap, corrected in zip(compared, found, holm([None if gap is None else gap.p for gap in found]), strict=True):
            half = "" if gap is None or gap.half is None else f"± {gap.half:.4f}"
            p, p_holm = ("" if value is None else f"{value:.2g}" for value in (None if gap is None else gap.p, corrected))
            pair = f"{a.optimizer} minus {b.optimizer}"
            values = gaps(a.losses, b.losses)
            lines.append(f"| {task} | {pair} | {spread(values, sign='+')} | {half} | {p} | {p_holm} | {len(values)} |")
    said = "mean (standard deviation) over n seeds; p: two-sided t-test of the paired differences; Holm: corrected for the pairs"
    return "\n".join([*lines, "", said])


def tested(a: Mapping[int, float], b: Mapping[int, float]) -> Difference | None:
    """a − b by seed with its interval and p; None if a loss is infinite or all differences are equal."""
    values = gaps(a, b)
    return difference(a, b) if all(map(math.isfinite, values)) and len(set(values)) > 1 else None


def gaps(a: Mapping[int, float], b: Mapping[int, float]) -> list[float]:
    """a - b, seed by seed."""
    return [a[seed] - b[seed] for seed in a]


def spread(values: Sequence[float], sign: str = "") -> str:
    """The text "mean (standard deviation)"; for a single value the value alone."""
    if len(values) == 1:
        return f"{values[0]:{sign}.4f}"
    deviation = stdev(values) if all(map(math.isfinite, values)) else math.nan
    return f"{mean(values):{sign}.4f} ({deviation:.4f})"


if __name__ == "__main__":
    sys.exit(main())
