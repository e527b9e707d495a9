"""`python -m launch.benchmark gpu --out DIR`: every subject that needs a GPU, in one command, within ten minutes.

Every part runs in a process of its own with a time limit, so that a part that fails or hangs does not stop the others. Nothing
is downloaded: tokens and images are random.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from launch.benchmark.measure import Column, Row, table

BENCHMARK = (sys.executable, "-m", "launch.benchmark")
KERNEL_TESTS = "tests/celo2/test_celo2_kernels.py"
COLUMNS = (Column("part", "part"), Column("outcome", "outcome"), Column("seconds", "s", ",.0f"))


class Part(NamedTuple):
    """One subject of the measurement."""

    name: str
    command: tuple[str, ...]
    limit: float  # s


def parts(out: Path) -> list[Part]:
    """The parts, the most important first; their limits add up to ten minutes."""
    subjects = [
        ("optimizer-125m", ("optimizer", "--sizes", "gpt3-125m"), 60),
        ("optimizer-350m", ("optimizer", "--sizes", "gpt3-350m"), 60),
        ("optimizer-1.3b", ("optimizer", "--sizes", "gpt3-1.3b", "--rounds", "3"), 90),
        ("train-125m", ("train", "--sizes", "gpt3-125m", "--profile", str(out / "profile-125m.txt")), 80),
        ("train-1.3b", ("train", "--sizes", "gpt3-1.3b", "--rounds", "3"), 110),
        ("loss", ("loss", "--rounds", "3"), 40),
        ("precision", ("precision", "--rounds", "2"), 50),
        ("unroll", ("unroll", "--rounds", "3"), 30),
    ]
    found = [Part(name, (*BENCHMARK, *command, "--json", str(out / f"{name}.json")), limit) for name, command, limit in subjects]
    found.insert(3, Part("kernel-tests", (sys.executable, "-m", "pytest", KERNEL_TESTS, "-k", "on_the_gpu"), 80))
    return found


def run_part(part: Part, out: Path) -> Row:
    """Run a part, keep what it prints in `out`, and say how it ended."""
    log, start = out / f"{part.name}.txt", time.monotonic()
    if "pytest" in part.command and importlib.util.find_spec("pytest") is None:
        return {"part": part.name, "outcome": "not run: pytest is not installed", "seconds": 0.0}
    with log.open("w", encoding="utf-8") as file:
        try:
            status = subprocess.run(part.command, stdout=file, stderr=subprocess.STDOUT, timeout=part.limit).returncode
            outcome = "done" if status == 0 else f"failed with exit status {status}, see {log.name}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after its {part.limit:.0f} s, see {log.name}"
    return {"part": part.name, "outcome": outcome, "seconds": time.monotonic() - start}


def measure_gpu(out: Path, chosen: list[Part]) -> list[Row]:
    """Run all parts. After each, DIR/summary.json and DIR/summary.md are written again, with the tables of the finished parts."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for part in chosen:
        rows.append(run_part(part, out))
        print(f"{part.name}: {rows[-1]['outcome']} ({rows[-1]['seconds']:.0f} s)", flush=True)
        (out / "summary.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        sections = [
            f"## {row['part']}\n\n{(out / (row['part'] + '.txt')).read_text(encoding='utf-8')}" for row in rows if row["seconds"]
        ]
        (out / "summary.md").write_text("\n\n".join(["# Measurement", table(rows, COLUMNS), *sections]) + "\n", encoding="utf-8")
    return rows
