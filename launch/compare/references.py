"""Curves of other people's runs to lay over a report: a CSV, an export of Weights & Biases, JSON, marin's result.json.

A reference is {"label", "source", "x": "tokens", "step" or null, "points": [[x, loss], ...]}; without x it is one loss, a level.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.load import ConfigError
from launch.compare.curves import thinned

Reference = dict[str, Any]
X_NAMES = {
    **dict.fromkeys(("tokens", "total_tokens", "throughput/total_tokens", "train/tokens", "n_tokens"), "tokens"),
    **dict.fromkeys(("step", "_step", "global_step", "trainer/global_step", "train/global_step", "iter", "iteration"), "step"),
}
LOSSES = ("val_loss", "validation loss", "validation_loss", "eval/loss", "val/loss", "eval_loss", "val", "loss", "train/loss")
BANDS = ("__MIN", "__MAX")  # columns that Weights & Biases adds to each
MOST_POINTS = 500
MOST_NAMED = 20  # columns, in a message
MARIN = re.compile(r"([\w-]+/[\d.]+[mb]/\d+)/result\.json$")  # optimizer, size, multiple of Chinchilla's tokens


def read_references(path: str | Path) -> list[Reference]:
    """The curves in a file.

    Raises:
        ConfigError: the file cannot be read, has no known form, or holds a value that is no finite number; the message names it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--reference {path}: cannot read it ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--reference {path}: not a text file, expected a CSV or JSON") from None
    try:
        found = from_json(json.loads(text), path) if path.suffix == ".json" else from_lines(text, path)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--reference {path}: damaged JSON ({error})") from None
    except csv.Error as error:
        raise ConfigError(f"--reference {path}: damaged CSV ({error})") from None
    if not found:
        names = ", ".join(f"'{name:.40}'" for name in columns_of(text, path)[:MOST_NAMED]) or "none"
        raise ConfigError(
            f"--reference {path}: no column with a loss ({', '.join(LOSSES)}) beside one with tokens or steps "
            f"({', '.join(X_NAMES)}); its columns: {names}"
        )
    return [{**reference, "label": f"{reference['label']} (reference)", "source": path.name} for reference in found]


def from_lines(text: str, path: Path) -> list[Reference]:
    """A CSV, or one JSON object a line, as metrics.jsonl."""
    if text.lstrip().startswith("{"):
        return from_records([json.loads(line) for line in text.splitlines() if line.strip()], path, path.stem)
    rows = list(rows_of(text))
    if text.strip() and not rows:
        raise ConfigError(f"--reference {path}: no rows below its names of columns")
    return from_table(rows, path)


def rows_of(text: str) -> csv.DictReader:
    """The rows of a CSV. Its columns are divided by commas, or by semicolons or tabs if its first line has no comma."""
    header = re.sub('"[^"]*"', "", text.partition("\n")[0])  # names in quotes may hold a comma
    delimiter = next((mark for mark in ",;\t" if mark in header), ",")
    return csv.DictReader(text.splitlines(), delimiter=delimiter, skipinitialspace=True)


def columns_of(text: str, path: Path) -> list[str]:
    """The names of the columns in a file, for a message; of JSON the keys."""
    if path.suffix != ".json" and not text.lstrip().startswith("{"):
        return [name for name in rows_of(text).fieldnames or () if name]
    tree = json.loads(text if path.suffix == ".json" else text.lstrip().splitlines()[0])
    rows = tree if isinstance(tree, list) else [tree]
    return list(dict.fromkeys(str(key) for row in rows if isinstance(row, dict) for key in row))


def from_json(tree: Any, path: Path) -> list[Reference]:
    """marin's result.json; a list of records; or a mapping of labels to records, pairs or columns."""
    if isinstance(tree, dict) and isinstance(tree.get("min_loss"), int | float):
        where = MARIN.search(path.resolve().as_posix())
        label = where[1] if where else path.stem
        return [{"label": label, "x": None, "points": [[0.0, number(tree["min_loss"], path, "min_loss")]]}]
    if isinstance(tree, list):
        return from_records(tree, path, path.stem)
    found: list[Reference] = []
    for label, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
            value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
        if isinstance(value, list) and value and all(isinstance(row, list) and len(row) == 2 for row in value):
            value = [{"tokens": x, "loss": y} for x, y in value]
        if isinstance(value, list):
            found += from_records(value, path, str(label))
    return found


def from_records(records: Sequence[Any], path: Path, label: str) -> list[Reference]:
    """One curve: the first known name of a loss over the first known name of tokens or steps."""
    rows = [row for row in records if isinstance(row, dict)]
    x_name = next((name for name in X_NAMES if any(name in row for row in rows)), None)
    loss = next((name for name in LOSSES if any(row.get(name) is not None for row in rows)), None)
    if x_name is None or loss is None:
        return []
    return curve(label, X_NAMES[x_name], ((row.get(x_name), row.get(loss)) for row in rows), path, loss)


def from_table(rows: Sequence[Mapping[str, Any]], path: Path) -> list[Reference]:
    """The columns of a CSV: those with a known name or, in a Weights & Biases export, `RUN - METRIC` for each run."""
    names = [name for name in (rows[0] if rows else ()) if name]
    x_name = next((name for name in names if name.strip().lower() in X_NAMES), None)
    if x_name is None:
        return []
    exported = [n for n in names if " - " in n and not n.endswith((*BANDS, " - _step"))]
    known = next((name for loss in LOSSES for name in names if name.strip().lower() == loss), None)
    found: list[Reference] = []
    for name in exported or ([known] if known else []):
        label = name.rpartition(" - ")[0] if exported else path.stem
        found += curve(label, X_NAMES[x_name.strip().lower()], ((row[x_name], row[name]) for row in rows), path, name)
    return found


def curve(label: str, x: str, pairs: Iterable[tuple[Any, Any]], path: Path, name: str) -> list[Reference]:
    """A reference, x ascending; rows without a value are left out."""
    points = [[number(a, path, x), number(b, path, name)] for a, b in pairs if a not in (None, "") and b not in (None, "", "NaN")]
    return [{"label": label, "x": x, "points": thinned(sorted(points), MOST_POINTS)}] if points else []


def number(value: Any, path: Path, name: str) -> float:
    """`value` as a finite number."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(value, bool) or not math.isfinite(found):
        raise ConfigError(f"--reference {path}: {name} holds '{str(value)[:40]}', which is not a finite number")
    return found
