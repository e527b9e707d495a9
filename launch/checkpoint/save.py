"""Writing checkpoints. Training waits only until everything is copied to host memory; a thread writes the files."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from configs.schema import Checkpoint as CheckpointConfig
from launch.checkpoint.permissions import usual_permissions
from launch.checkpoint.retention import surplus
from launch.checkpoint.verify import MANIFEST, CheckpointError, Progress, checkpoint_name, sha256
from launch.distributed.gather import collect
from launch.distributed.strategy import Strategy

SPARE_BYTES = 64 << 20  # left free on the disk beside a checkpoint
# The phases of writing a checkpoint, in order. Hashes and flushes are announced for each file.
PHASES = ("temporary folder", "weights", "hashes", "flush to disk", "rename", "deletion of old checkpoints")
Announce = Callable[[str], None]  # gets a phase of PHASES before it begins


class Saver:
    """Decides when a training run is saved, and writes its checkpoints beside the training, one at a time.

    Only the first rank writes. The other ranks make the same decisions and write nothing.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        report: Callable[[dict[str, Any]], None],
        write: bool,
        saved: int,
        announce: Announce = lambda phase: None,
        origin: int | None = None,
        progress: Progress = lambda: None,
    ) -> None:
        """A saver of the run whose checkpoints are in `folder`.

        Args:
            folder: it gets a folder for each checkpoint.
            config: the section `checkpoint`.
            report: gets a record for each checkpoint: step, stall_seconds, write_seconds and bytes, or an error.
            write: whether this rank writes.
            saved: the step of the newest checkpoint.
            announce: called in the thread that writes, before each of its PHASES.
            origin: the step of the checkpoint that the run branched from; it is never deleted. None: it began at step 0.
            progress: the heartbeat's, called while it writes.
        """
        self.folder, self.config, self.report, self.write, self.saved = folder, config, report, write, saved
        self.announce, self.origin, self.progress = announce, origin, progress
        self.asked = False  # all ranks agreed that the first one's clock asks for a checkpoint
        self.clock = time.monotonic()
        self.thread: threading.Thread | None = None
        self.error: CheckpointError | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not KeyboardInterrupt:  # a second Ctrl-C stops at once, and a half-written checkpoint harms nothing
            self.wait()

    @property
    def overdue(self) -> bool:
        """Whether this rank's clock asks for a checkpoint. The first rank's counts."""
        return self.write and 0 < self.config.minutes * 60 <= time.monotonic() - self.clock

    def due(self, step: int, scheduled: bool, stop: bool) -> bool:
        """Whether to save after `step`: it is not saved yet, and the schedule, the clock or the end of the run asks for it."""
        return step > self.saved and (scheduled or self.asked or stop)

    def ask(self, step: int) -> None:
        """Ask for a checkpoint of `step`, even if there is one: its state has changed."""
        self.asked, self.saved = True, min(self.saved, step - 1)

    def save(self, strategy: Strategy, state: dict[str, Any]) -> None:
        """Wait for the checkpoint before this one, copy everything to the first rank's host memory, and start writing.

        Every rank must call it. `state` becomes state.json.
        """
        self.saved, self.asked, self.clock = state["step"], False, time.monotonic()
        start = time.perf_counter()
        self.wait()
        snapshot = take_snapshot(strategy, state)
        if not self.write:
            return
        stall = time.perf_counter() - start
        self.thread = threading.Thread(target=self._write, args=(snapshot, stall), name="checkpoint", daemon=True)
        self.thread.start()

    def _write(self, snapshot: Snapshot, stall: float) -> None:
        start, record = time.perf_counter(), {"step": snapshot.state["step"], "stall_seconds": stall}
        try:
            path = write_checkpoint(self.folder, snapshot, self.config, self.announce, self.origin, self.progress)
            record["bytes"] = sum(file.stat().st_size for file in path.iterdir())
            self.error = None
        except Exception as error:  # whatever it is, the run goes on, and its events say so
            self.error = error if isinstance(error, CheckpointError) else CheckpointError(f"checkpoint: {error!r}")
            record["error"] = str(self.error)
        self.report({"event": "checkpoint", **record, "write_seconds": time.perf_counter() - start})

    def wait(self) -> None:
        """Wait until the last checkpoint is written, or has failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def close(self) -> None:
        """Wait for the last checkpoint. Raises CheckpointError if it could not be written."""
        self.wait()
        if self.error is not None:
            raise self.error


class Snapshot(NamedTuple):
    """A checkpoint in host memory."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    config: str
    state: dict[str, Any]


def take_snapshot(strategy: Strategy, state: dict[str, Any]) -> Snapshot:
    """Copies of weights and optimizer state on the first rank's CPU. Every rank must call it."""
    weights, moments = collect(strategy)
    return Snapshot(weights, moments, strategy.model.config.to_json_string(use_diff=False), state)


def write_checkpoint(
    folder: Path,
    snapshot: Snapshot,
    config: CheckpointConfig,
    announce: Announce = lambda phase: None,
    origin: int | None = None,
    progress: Progress = lambda: None,
) -> Path:
    """Write `folder/step_<state["step"]>`, and then delete the checkpoints that `launch.checkpoint.retention` gives up.

    Raises:
        CheckpointError: no space, no permission, ...; everything that was there before is still there.
    """
    target = folder / checkpoint_name(snapshot.state["step"])
    temporary, replaced = folder / f".{target.name}.tmp", folder / f".{target.name}.old"
    try:
        announce("temporary folder")
        remove(temporary)
        temporary.mkdir(parents=True)
        check_free_space(folder, [*snapshot.weights.values(), *snapshot.moments.values()])
        announce("weights")
        save_file(snapshot.weights, temporary / "model.safetensors")
        progress()
        save_file(snapshot.moments, temporary / "optimizer.safetensors")
        (temporary / "config.json").write_text(snapshot.config, encoding="utf-8")
        (temporary / "state.json").write_text(json.dumps(snapshot.state, indent=1), encoding="utf-8")
        usual_permissions(temporary)
        write_manifest(temporary, announce, progress)
        for path in (*temporary.iterdir(), temporary):
            announce("flush to disk")
            progress()
            flush(path)
        announce("rename")
        if os.path.lexists(target):  # of the same step: a damaged one, or one that a rollback writes again
            remove(replaced)
            target.rename(replaced)
        temporary.rename(target)
        flush(folder)
        announce("deletion of old checkpoints")
        for old in [replaced, *surplus(target, config, origin)]:
            remove(old)
    except (OSError, SafetensorError) as error:
        remove(temporary)
        raise CheckpointError(f"cannot write checkpoint {target}: {error}") from error
    return target


def write_manifest(folder: Path, announce: Announce = lambda phase: None, progress: Progress = lambda: None) -> None:
    """Write the manifest of the files that are in `folder`."""
    manifest = {}
    for file in sorted(folder.iterdir()):
        announce("hashes")
        manifest[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file, progress)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def remove_leftovers(folder: Path) -> None:
    """Put in order what a process left that was killed while it wrote: a replaced checkpoint comes back, the rest goes."""
    for replaced in folder.glob(".step_*.old"):
        target = folder / replaced.name[1 : -len(".old")]
        if not target.exists():
            replaced.rename(target)
    for leftover in folder.glob(".step_*"):
        remove(leftover)


def remove(path: Path) -> None:
    """Remove a folder, or a link without what it leads to, as far as that is possible."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def check_free_space(folder: Path, tensors: list[Tensor]) -> None:
    """Raise OSError if the disk has no room for `tensors`."""
    needed = sum(t.numel() * t.element_size() for t in tensors) + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"no space left: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")


def flush(path: Path) -> None:
    """Make the operating system write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
