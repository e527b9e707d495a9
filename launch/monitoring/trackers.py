"""Trackers: where the numbers of metrics.jsonl go besides. A training run is one run of each, over all its starts."""

from __future__ import annotations

import json
import tempfile
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from configs.load import ConfigError, to_yaml
from configs.schema import Config
from data.files import replace_text

ROOM = 64 << 10  # bytes; more than the numbers of a step take


class Tracker(Protocol):
    """One tracker of one start of a training run. Only the first rank has any.

    OSError says that a disk does not take numbers now: the tracker stays, and gets the next ones.
    """

    def write(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step."""

    def rewind(self, step: int, written: int) -> None:
        """The run goes on after `step`; an earlier start, or this one before a rollback, has written up to the step `written`."""

    def close(self) -> None:
        """Everything is written."""


class TensorBoard:
    """Writes into `<run.dir>/tensorboard`. What is done again replaces what an earlier start has written of those steps.

    A writer of TensorBoard that finds no space dies with a traceback. So whether there is some is tried before, and numbers wait
    here; after an error all the same, a new writer with a file of its own takes them.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.folder, self.text = run_dir / "tensorboard", to_yaml(config)
        self.writer: Any = None
        self.waiting: list[tuple[int, dict[str, float]]] = []
        self.begins = False  # the next file begins the run
        self.purge: int | None = None  # with the next file TensorBoard leaves out what it has read of the steps from here on

    def rewind(self, step: int, written: int) -> None:
        self.waiting = [record for record in self.waiting if record[0] <= step]
        self.begins, self.purge = step == 0, step + 1 if written > step else None
        self.close()
        self._send()

    def write(self, step: int, values: dict[str, float]) -> None:
        self.waiting.append((step, values))
        self._send()

    def close(self) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.close()

    def _send(self) -> None:
        """Write what waits. Raises OSError where the disk does not take it."""
        from torch.utils.tensorboard import SummaryWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder) as trial:
            trial.write(bytes(ROOM))
            trial.flush()
        try:
            if self.writer is None:
                self.writer = SummaryWriter(str(self.folder), purge_step=self.purge)
                if self.begins:
                    self.writer.add_text("config", f"```\n{self.text}```", 0)
                self.begins, self.purge = False, None
            for step, values in self.waiting:
                for key, value in values.items():
                    self.writer.add_scalar(key, value, step)
            self.writer.flush()
        except OSError:
            self.writer = None
            raise
        self.waiting.clear()


class WandB:
    """A run named `run.name` in the project `log.project`, in the group `log.group` if there is one.

    wandb.json in the run's folder holds its id, so that every start continues the same run. W&B does not take a step twice, so
    steps that are done again are not sent.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        import wandb

        path = run_dir / "wandb.json"
        if not path.exists():
            replace_text(path, json.dumps({"id": uuid.uuid4().hex}))
        identity = json.loads(path.read_text(encoding="utf-8"))["id"]
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


TRACKERS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


def open_trackers(config: Config, run_dir: Path) -> dict[str, Tracker]:
    """The trackers of `log.trackers`, by name.

    Raises:
        ConfigError: a tracker that does not start, as without a network or a login.
    """
    trackers: dict[str, Tracker] = {}
    for name in dict.fromkeys(config.log.trackers):
        try:
            trackers[name] = TRACKERS[name](config, run_dir)
        except Exception as error:
            raise ConfigError(f"log.trackers: {name} does not start: {' '.join(str(error).split())}") from error
    return trackers
