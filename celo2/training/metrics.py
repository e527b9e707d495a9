"""Reading and rewinding metrics.jsonl: one JSON object per line, appended while a training runs.

The file may come from somebody else, or from a disk that damaged it: what is no record of a training is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celo2.training.atomic import write_atomically


def read_lines(path: Path) -> list[Any]:
    """What JSON says in each line of a file, None for a line that is none; nothing of the last one if a kill cut it short."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    return [parsed(line) for line in lines[:-1] + [line for line in lines[-1:] if parsed(line) is not None]]


def parsed(line: str) -> Any:
    """What JSON says, or None."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # nested too deeply
        return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of the file; none if there is no file."""
    return [record for line in read_lines(path) if (record := as_record(line)) is not None]


def as_record(line: Any) -> dict[str, Any] | None:
    """A record has a number of the step or iteration, and other numbers by name; one that is not finite is None."""
    if not isinstance(line, dict):
        return None
    record = {key: finite(value) for key, value in line.items() if value is None or isinstance(value, int | float)}
    number = record.get("step", record.get("iteration"))
    return record if type(number) is int and number >= 0 else None


def finite(value: float | None) -> float | None:
    """The number, if it is one that a float can hold."""
    try:
        return value if value is not None and math.isfinite(value) else None
    except OverflowError:
        return None


def rewind(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite the file with the records for which `keep` is true. A kill leaves the old file or the new one, whole."""
    kept = [json.dumps(record) + "\n" for record in read_metrics(path) if keep(record)]
    write_atomically(path, "".join(kept).encode())
