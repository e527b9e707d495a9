"""What a run leaves behind and shows while it goes: metrics.jsonl, events.jsonl, trackers, a progress bar or plain lines."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from celo2.training.metrics import read_metrics, rewind
from configs.schema import Config

__all__ = ["Display", "Metrics", "flat", "read_metrics"]


class Metrics:
    """metrics.jsonl: one JSON object a line, on the first rank alone; the same numbers go to the trackers.

    Beside it, events.jsonl says what happened to the run: starts, checkpoints, skipped steps, spikes, rollbacks.
    """

    def __init__(self, accelerator: Accelerator, config: Config, run_dir: Path, tracker_ids: dict[str, str]) -> None:
        self.accelerator, self.path, self.events = accelerator, run_dir / "metrics.jsonl", run_dir / "events.jsonl"
        self.first = accelerator.is_main_process
        if config.log.trackers:
            continued = {name: {"id": value, "resume": "allow"} for name, value in tracker_ids.items()}
            accelerator.init_trackers(config.run.name, config=flat(asdict(config)), init_kwargs=continued)

    def rewind(self, step: int, evaluated: int) -> None:
        """Drop what was logged after `step`, and an evaluation after `evaluated`: both are about to be done again."""
        if self.first:
            rewind(self.path, lambda record: record["step"] <= (evaluated if "val_loss" in record else step))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; the trackers get it under the same names. Numbers that are not finite become null."""
        record = {key: value if math.isfinite(value) else None for key, value in record.items()}
        if self.first:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        values = {key: value for key, value in record.items() if key != "step" and value is not None}
        self.accelerator.log(values, step=record["step"])

    def flush(self) -> None:
        """Have what was logged written to the disk, before a checkpoint that must not outlive it."""
        if self.first and self.path.exists():
            with self.path.open("a") as file:
                os.fsync(file.fileno())

    def event(self, record: dict[str, Any]) -> None:
        """Append one record to events.jsonl, with the time of day; from any thread."""
        if self.first:
            with self.events.open("a") as file:
                file.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **record}) + "\n")


class Display:
    """A live progress bar on a terminal, a plain line for each logged step elsewhere; silent on other ranks."""

    def __init__(self, steps: int, start: int, first: bool) -> None:
        self.steps, self.first = steps, first
        self.console = Console(file=sys.stdout)
        columns = ("[progress.percentage]{task.percentage:>3.0f}%", "{task.fields[text]}")
        self.bar = Progress(
            BarColumn(20),
            MofNCompleteColumn(),
            *(TextColumn(column) for column in columns),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (first and self.console.is_terminal),
        )
        self.task = self.bar.add_task("", total=steps, completed=start, text="")

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, done: int) -> None:
        """`done` steps are finished."""
        self.bar.update(self.task, completed=done)

    def training(self, record: dict[str, Any]) -> None:
        """Show a training record."""
        text = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in record:
            text += f"  MFU {record['mfu']:.1%}"
        if self.bar.disable:
            self.say(f"step {record['step']:>6}/{self.steps}  {text}  {record['seconds']:.0f} s")
        else:
            self.bar.update(self.task, text=text)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.first:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys, with values that every tracker accepts."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return result
