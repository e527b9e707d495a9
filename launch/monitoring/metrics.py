"""What a training run logs: metrics.jsonl, events.jsonl, and the trackers."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from celo2.training.metrics import read_metrics, rewind
from configs.schema import Config
from launch.monitoring.growing import GrowingFile
from launch.monitoring.guard import Diverged
from launch.monitoring.trackers import Tracker, open_trackers


def stamped(record: dict[str, Any]) -> dict[str, Any]:
    """`record`, an event, with the current time."""
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **record}


class Lines(GrowingFile):
    """A file of JSON lines."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        super().__init__(path, say, "lines")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self.append((json.dumps(record) + "\n").encode())

    def before(self, size: int) -> bytes:
        """A line break, if a kill cut the last line short."""
        return b"\n" if size and not ends_a_line(self.path) else b""


def ends_a_line(path: Path) -> bool:
    """Whether the last byte of a file ends a line."""
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


class Metrics:
    """Writes metrics.jsonl, one JSON object a line, on the first rank; the same numbers go to the trackers.

    It also writes events.jsonl, which says what happened to the run: starts, checkpoints, skipped steps, spikes and rollbacks.
    The last event of a start says that it finished or stopped. If the training loop raises an error, this context manager around
    it writes that the run stopped because it diverged, which `launch.compare` looks for, or because of another error.
    """

    def __init__(
        self, accelerator: Accelerator, config: Config, run_dir: Path, say: Callable[[str], None] = lambda text: None
    ) -> None:
        """`say` shows a warning to the user."""
        self.path, self.say = run_dir / "metrics.jsonl", say
        self.lines, self.events = Lines(self.path, say), Lines(run_dir / "events.jsonl", say)
        self.first = accelerator.is_main_process
        self.trackers: dict[str, Tracker] = open_trackers(config, run_dir, say) if self.first else {}

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Exception):
            reason = "diverged" if isinstance(error, Diverged) else "error"
            self.event({"event": "stopped", "reason": reason, "error": str(error)})
        self.flush()
        self._track(lambda tracker: tracker.close())

    def rewind(self, step: int, evaluated: int) -> None:
        """Drop steps after `step` and evaluations after `evaluated`, which the run is about to repeat."""
        if self.first:

            def keep(record: dict[str, Any]) -> bool:
                return record["step"] <= (evaluated if "val_loss" in record else step)

            written = max((record["step"] for record in read_metrics(self.path)), default=0)
            rewind(self.path, keep)
            self.lines.waiting = [line for line in self.lines.waiting if keep(json.loads(line))]
            self._track(lambda tracker: tracker.rewind(step, written))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, and give it to the trackers under the same names. Numbers that are not finite become null."""
        if self.first:
            record = {key: value if value is not None and math.isfinite(value) else None for key, value in record.items()}
            self.lines.write(record)
            values = {key: value for key, value in record.items() if key != "step" and value is not None}
            self._track(lambda tracker: tracker.write(record["step"], values))

    def _track(self, act: Callable[[Tracker], None]) -> None:
        """Call `act` with each tracker. A tracker that fails gets no more calls: the run does not need it."""
        for name, tracker in list(self.trackers.items()):
            try:
                act(tracker)
            except Exception as error:
                del self.trackers[name]
                self.say(f"warning: {name} gets no more numbers: {' '.join(str(error).split())}")

    def flush(self) -> None:
        """Make the operating system write the metrics to the disk, before a checkpoint that relies on them."""
        if self.first:
            self.lines.flush()
            self.events.flush()

    def event(self, record: dict[str, Any]) -> None:
        """Append one record to events.jsonl, with the time. Any thread may call it."""
        if self.first:
            self.events.write(stamped(record))
