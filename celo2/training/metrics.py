"""Read and rewind metrics.jsonl: one JSON object per line, appended during a training run.

The file may be of another program or damaged: lines that are not records of a training run are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celo2.training.atomic import write_atomically


def read_lines(path: Path) -> list[Any]:
    """The JSON value of each line of a file, None for an invalid line. A last line that a kill cut short is dropped."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    return [parsed(line) for line in lines[:-1] + [line for line in lines[-1:] if parsed(line) is not None]]


def parsed(line: str) -> Any:
    """The JSON value of a line, or None if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # nested too deeply
        return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of the file (`as_record`); empty if there is no file."""
    return [record for line in read_lines(path) if (record := as_record(line)) is not None]


def as_record(line: Any) -> dict[str, Any] | None:
    """A line as a record: a step or iteration number, and other numbers by name, None if not finite. None if it is no record."""
    if not isinstance(line, dict):
        return None
    record = {key: finite(value) for key, value in line.items() if value is None or isinstance(value, int | float)}
    number = record.get("step", record.get("iteration"))
    return record if type(number) is int and number >= 0 else None


def finite(value: float | None) -> float | None:
    """`value` if it is finite and fits into a float, else None."""
    try:
        return value if value is not None and math.isfinite(value) else None
    except OverflowError:
        return None


def rewind(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite the file with only the records for which `keep` is true, atomically."""
    kept = [json.dumps(record) + "\n" for record in read_metrics(path) if keep(record)]
    write_atomically(path, "".join(kept).encode())
