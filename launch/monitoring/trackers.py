"""Trackers: services that also get the numbers of metrics.jsonl. All starts of a training run are one run of a tracker."""

from __future__ import annotations

import io
import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import accelerate.utils

from configs.load import ConfigError, to_yaml
from configs.schema import Config
from data.files import read_json, replace_text
from launch.monitoring.growing import GrowingFile

Say = Callable[[str], None]  # shows a warning to the user


class Tracker(Protocol):
    """One tracker of one start of a training run. Only the first rank has any."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Take the numbers of a step."""

    def rewind(self, step: int, written: int) -> None:
        """The run resumes after `step`; an earlier start, or this one before a rollback, has written up to the step `written`."""

    def close(self) -> None:
        """Finish: there are no more numbers."""


class TensorBoard:
    """Writes into `<run.dir>/tensorboard`. A repeated step replaces what an earlier start has written for it.

    torch's SummaryWriter is not used: it writes in a thread, which a full disk ends for good. Here records wait for space.
    """

    def __init__(self, config: Config, run_dir: Path, say: Say) -> None:
        self.folder, self.text, self.say = run_dir / "tensorboard", to_yaml(config), say
        self.file: GrowingFile | None = None

    def rewind(self, step: int, written: int) -> None:
        """Begin a new file. A `SessionLog` makes TensorBoard drop what it has read of its step and of later ones."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from torch.utils.tensorboard.summary import text

        self.close()
        waiting = self.file.waiting if self.file is not None else []
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self.file = GrowingFile(self.folder / name, self.say, "numbers")
        self.event(file_version="brain.Event:2")
        for record in waiting:  # of the previous file, when the disk was full
            self.file.append(record)
        if written > step:
            self.event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        if step == 0:
            self.event(step=0, summary=text("config", f"```\n{self.text}```"))

    def write(self, step: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        found = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self.event(step=step, summary=Summary(value=found))

    def event(self, **content: Any) -> None:
        """Append an event in TensorBoard's format of records."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **content).SerializeToString())
        if self.file is not None:
            self.file.append(record.getvalue())

    def close(self) -> None:
        if self.file is not None:
            self.file.flush()


class WandB:
    """A run named `run.name` in the project `log.project`, in the group `log.group` if there is one.

    wandb.json in the run's folder holds its id, so that every start continues the same run. W&B does not accept a step twice, so
    repeated steps are not sent.
    """

    def __init__(self, config: Config, run_dir: Path, say: Say) -> None:
        import wandb

        path = run_dir / "wandb.json"
        if not path.exists():
            replace_text(path, json.dumps({"id": uuid.uuid4().hex}))
        identity = read_json(path)["id"]
        log, name = config.log, config.run.name
        self.run = wandb.init(
            project=log.project, group=log.group, name=name, id=identity, resume="allow", dir=str(run_dir), config=asdict(config)
        )
        self.written = 0

    def rewind(self, step: int, written: int) -> None:
        self.written = written

    def write(self, step: int, values: dict[str, float]) -> None:
        if step > self.written:
            self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class ThroughAccelerate:
    """An Accelerate tracker: a run named `run.name` in the project (experiment) `log.project`, with `log.group` as its tag.

    NAME.json in the run's folder holds its id, so that every start continues the same run. Repeated steps are not sent, since
    these services would keep both.
    """

    def __init__(self, name: str, config: Config, run_dir: Path, say: Say) -> None:
        from accelerate import tracking

        log, run = config.log, config.run.name
        group = [log.group] if log.group else []
        path = run_dir / f"{name}.json"
        known = read_json(path)["id"] if path.exists() else None
        self.tracker: Any
        if name == "mlflow":
            tags = {"group": log.group} if log.group else None
            self.tracker = tracking.MLflowTracker(log.project, run_id=known, run_name=run, tags=tags)
        elif name == "comet_ml":
            known = known or uuid.uuid4().hex
            self.tracker = tracking.CometMLTracker(log.project, experiment_key=known)
        elif name == "trackio":
            known = known or f"{run}-{uuid.uuid4().hex[:8]}"  # Trackio distinguishes runs by their names
            self.tracker = tracking.TrackioTracker(log.project, name=known, group=log.group, resume="allow")
        else:
            options = {"experiment": log.project, "system_tracking_interval": None, "capture_terminal_logs": False}
            self.tracker = tracking.AimTracker(run, run_hash=known, **options)
        self.tracker.start()
        inner = self.tracker.tracker
        if not path.exists():
            if name == "comet_ml":
                inner.set_name(run)
            for tag in group if name in ("comet_ml", "aim") else ():
                inner.add_tag(tag)
            self.tracker.store_init_configuration(flat(asdict(config)))
            identity = inner.info.run_id if name == "mlflow" else inner.hash if name == "aim" else known
            replace_text(path, json.dumps({"id": identity}))
        self.written = 0

    def rewind(self, step: int, written: int) -> None:
        self.written = max(self.written, written)

    def write(self, step: int, values: dict[str, float]) -> None:
        if step > self.written:
            self.tracker.log(values, step=step)

    def close(self) -> None:
        self.tracker.finish()


TRACKERS: dict[str, Callable[[Config, Path, Say], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}
TRACKERS |= {name: partial(ThroughAccelerate, name) for name in ("mlflow", "comet_ml", "trackio", "aim")}
ID_FILES = tuple(f"{name}.json" for name in TRACKERS if name != "tensorboard")  # in a run's folder


def require_installed(config: Config) -> None:
    """Raise ConfigError if the package of one of `log.trackers` is missing."""
    for name in config.log.trackers:
        if not getattr(accelerate.utils, f"is_{name}_available")():
            raise ConfigError(f"log.trackers asks for {name}, which is not installed (pip install {name})")


def open_trackers(config: Config, run_dir: Path, say: Say = lambda text: None) -> dict[str, Tracker]:
    """The trackers of `log.trackers`, by name.

    Raises:
        ConfigError: a tracker that does not start, as without a network or a login.
    """
    trackers: dict[str, Tracker] = {}
    for name in dict.fromkeys(config.log.trackers):
        try:
            trackers[name] = TRACKERS[name](config, run_dir, say)
        except Exception as error:
            raise ConfigError(f"log.trackers: {name} does not start: {' '.join(str(error).split())}") from error
    return trackers


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys, with values that every tracker accepts."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return result
