"""Reading and rewinding metrics.jsonl: one JSON object per line, appended while a training runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celo2.training.atomic import write_atomically


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of the file; none if there is no file. A last line that a kill cut short is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def rewind(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite the file with the records for which `keep` is true. A kill leaves the old file or the new one, whole."""
    kept = [json.dumps(record) + "\n" for record in read_metrics(path) if keep(record)]
    write_atomically(path, "".join(kept).encode())
