"""Checkpoints: whole, by parameter name, without pickle.

    checkpoints/step_00000100/
        model.safetensors       weights by parameter name, a tied weight once
        optimizer.safetensors   optimizer state as `<parameter name>/<state name>`, in its own dtype
        config.json             the transformers configuration of the model
        state.json              step, tokens, seconds, the run's configuration, the data set
        manifest.json           size and sha256 of every file above; written last

A checkpoint is written to a temporary folder, flushed to disk and renamed; only then are older ones deleted. A folder
`step_*` without a manifest that fits is no checkpoint. Training waits for the copy to host memory alone: a thread writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.schema import Checkpoint as CheckpointConfig
from launch.checkpoint.gather import REPLICATED, collect, kept_here, read_run
from launch.distributed.strategy import Strategy

MANIFEST = "manifest.json"
SPARE_BYTES = 64 << 20  # left free on the disk beside a checkpoint


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used; the message names it."""


def due(step: int, every: int, steps: int) -> bool:
    """Whether something happens after `step`: at every multiple of `every` (0: never), and at the last step."""
    return step == steps or (every > 0 and step % every == 0)


class Saver:
    """Decides when a run is saved, and has its checkpoints written beside the training, one at a time.

    Only the first rank writes; the others make the same decisions and write nothing.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, report: Callable[[dict[str, Any]], None], write: bool, saved: int
    ) -> None:
        """`report` gets a record for each checkpoint: step, stall, write seconds and bytes, or an error. `saved`: at step."""
        self.folder, self.config, self.report, self.write, self.saved = folder, config, report, write, saved
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
        """Whether this rank's clock asks for a checkpoint; the first rank's counts."""
        return self.write and 0 < self.config.minutes * 60 <= time.monotonic() - self.clock

    def due(self, step: int, steps: int, stop: bool) -> bool:
        """Whether to save after `step` of `steps`."""
        return step > self.saved and (stop or self.asked or due(step, self.config.every, steps))

    def save(self, strategy: Strategy, state: dict[str, Any]) -> None:
        """Bring everything to the first rank's host memory, waiting for the checkpoint before this one, and have it written.

        Every rank must call it.
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
            path = write_checkpoint(self.folder, snapshot, self.config.keep)
            record["bytes"] = sum(file.stat().st_size for file in path.iterdir())
            self.error = None
        except Exception as error:  # whatever it is, the run goes on, and says so
            self.error = error if isinstance(error, CheckpointError) else CheckpointError(f"checkpoint: {error!r}")
            record["error"] = str(self.error)
        self.report({"event": "checkpoint", **record, "write_seconds": time.perf_counter() - start})

    def wait(self) -> None:
        """Wait until the last checkpoint is written, or has failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def close(self) -> None:
        """Wait for the last checkpoint; CheckpointError if it could not be written."""
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
    """Copies of weights and optimizer state on the first rank's CPU; every rank must call it."""
    weights, moments = collect(strategy)
    return Snapshot(weights, moments, strategy.model.config.to_json_string(use_diff=False), state)


def write_checkpoint(folder: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write `folder/step_<state["step"]>`, and then delete all but the newest `keep` checkpoints.

    Raises:
        CheckpointError: no space, no permission, ...; everything that was there before is there still.
    """
    target = folder / f"step_{snapshot.state['step']:08d}"
    temporary, replaced = folder / f".{target.name}.tmp", folder / f".{target.name}.old"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        check_free_space(folder, [*snapshot.weights.values(), *snapshot.moments.values()])
        save_file(snapshot.weights, temporary / "model.safetensors")
        save_file(snapshot.moments, temporary / "optimizer.safetensors")
        (temporary / "config.json").write_text(snapshot.config)
        (temporary / "state.json").write_text(json.dumps(snapshot.state, indent=1))
        files = sorted(temporary.iterdir())
        manifest = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*files, temporary / MANIFEST, temporary):
            flush(path)
        if target.exists():  # of the same step: a damaged one, or one that a rollback writes anew
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        temporary.rename(target)
        flush(folder)
        for old in [replaced, *list_checkpoints(folder)[:-keep]]:
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot write checkpoint {target}: {error}") from error
    return target


def tidy(folder: Path) -> None:
    """Put in order what a start that was killed while it wrote has left: a checkpoint set aside comes back, the rest goes."""
    for aside in folder.glob(".step_*.old"):
        target = folder / aside.name[1 : -len(".old")]
        if not target.exists():
            aside.rename(target)
    for litter in folder.glob(".step_*"):
        shutil.rmtree(litter, ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a verified checkpoint."""
    return json.loads((path / "state.json").read_text())


def load_checkpoint(path: Path, strategy: Strategy) -> None:
    """Fill the shards of this rank from a verified checkpoint, tensor by tensor through CPU memory.

    Raises:
        CheckpointError: a checkpoint of another model or optimizer, naming the difference.
    """
    shards, optimizer = strategy.shards, strategy.optimizer
    with safe_open(path / "model.safetensors", "pt") as file, torch.no_grad():
        buffers = strategy.buffers
        require_same_names(path, "weights", [*shards, *buffers], file.keys())
        for name, shard in shards.items():
            require_same_shape(path, name, shard.local_shard.shape, file.get_slice(name).get_shape())
            shard.weight.copy_(read_run(file, name, shard.local_shard))
        for name, buffer in buffers.items():
            require_same_shape(path, name, buffer.shape, file.get_slice(name).get_shape())
            buffer.copy_(file.get_tensor(name))
    with safe_open(path / "optimizer.safetensors", "pt") as file, torch.no_grad():
        saved: dict[str, list[str]] = defaultdict(list)
        for entry in file.keys():  # noqa: SIM118
            name, _, key = entry.rpartition("/")
            if name not in shards:
                raise CheckpointError(f"{path}: optimizer state of '{name}', a parameter that the model lacks")
            saved[name].append(key)
        for name, shard in shards.items():
            if not kept_here(strategy, shard):
                continue
            state = optimizer.state.get(shard.weight) or None
            if state is not None:  # otherwise the optimizer makes it in its first step
                # State keeps its dtype here, whatever was saved. `count` goes with bfloat16 accumulators and else starts again.
                names = state.keys() - {"count"}, set(saved[name]) - {"count"}
                require_same_names(path, f"optimizer state of '{name}'", *names)
                if "count" in state:
                    state["count"].zero_()
            for key in saved[name]:
                entry = f"{name}/{key}"
                value = file.get_tensor(entry) if key in REPLICATED else read_run(file, entry, shard.local_shard)
                if state is None:
                    optimizer.state[shard.weight][key] = value.to(shard.weight.device)
                elif key in state:
                    require_same_shape(path, entry, state[key].shape, value.shape)
                    state[key].copy_(value)
    strategy.weights_changed()


def find_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and what was wrong with newer ones."""
    complaints = []
    for path in reversed(list_checkpoints(folder)):
        try:
            verify(path)
            return path, complaints
        except CheckpointError as error:
            complaints.append(str(error))
    return None, complaints


def list_checkpoints(folder: Path) -> list[Path]:
    """The folders `step_*`, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def verify(path: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its size and hash."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, expected in manifest.items():
            file = path / name
            if file.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{file} has {file.stat().st_size} bytes, its manifest says {expected['bytes']}")
            if sha256(file) != expected["sha256"]:
                raise CheckpointError(f"{file} is damaged: its sha256 is not the manifest's")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is no whole checkpoint: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path / MANIFEST} cannot be read ({error})") from None


def check_free_space(folder: Path, tensors: list[Tensor]) -> None:
    """Raise OSError if the disk has no room for `tensors`."""
    needed = sum(t.numel() * t.element_size() for t in tensors) + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"no space left: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")


def require_same_names(path: Path, what: str, own: Any, saved: Any) -> None:
    """Raise CheckpointError if two sets of names differ, naming one of the difference."""
    missing, extra = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
    if missing or extra:
        which = f"lacks '{missing[0]}'" if missing else f"holds '{extra[0]}', which this run has not"
        raise CheckpointError(f"{path}: of another model or optimizer: its {what} {which}")


def require_same_shape(path: Path, name: str, own: Sequence[int], saved: Sequence[int]) -> None:
    """Raise CheckpointError if a saved tensor has another shape."""
    if tuple(own) != tuple(saved):
        raise CheckpointError(f"{path}: of another model: '{name}' has shape {tuple(saved)}, this run {tuple(own)}")


def sha256(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have the operating system write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
