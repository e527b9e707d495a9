"""Decides which checkpoints of a training run are deleted when a new one is written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from configs.schema import Checkpoint as CheckpointConfig
from launch.checkpoint.state import read_state
from launch.checkpoint.verify import MANIFEST, CheckpointError, list_checkpoints, step_of, verify


def surplus(
    newest: Path,
    config: CheckpointConfig,
    origin: int | None = None,
    others: Sequence[Path] = (),
    damaged: Collection[Path] = (),
) -> list[Path]:
    """Return the checkpoints to delete after `newest` was written, from its folder and the folders `others`.

    Kept are: the newest `keep` up to this step; milestones, whose step is a multiple of `keep_every` now or was when they were
    written; with `keep_best`, the checkpoint with the lowest loss on the validation set of `newest`; and step `origin`, from
    which the run branched. Checkpoints of steps after `newest`, and folders that lack a checkpoint's name or manifest, are
    neither counted nor deleted. Damaged checkpoints, those of `damaged` and those with a file that is missing or has another
    size, do not count as one of the newest `keep` or as the best. They are deleted once there are `keep` others.
    """
    found = [path for folder in (newest.parent, *others) for path in list_checkpoints(folder)]
    own = sorted((path for path in found if step_of(path) <= step_of(newest) and (path / MANIFEST).exists()), key=step_of)
    states = {path: state_of(path) for path in own}
    kept = set(islice(whole(reversed(own), damaged), min(config.keep, len(own) + 1)))
    if len(kept) < config.keep:
        kept = set(own)
    for path, state in states.items():
        intervals = (config.keep_every, state.get("config", {}).get("checkpoint", {}).get("keep_every", 0))
        if step_of(path) == origin or any(every and step_of(path) % every == 0 for every in intervals):
            kept.add(path)
    validation = states[newest].get("validation") if newest in states else None
    losses = {
        path: state["val_loss"]
        for path, state in states.items()
        if measured(state) and (validation is None or state.get("validation", validation) == validation)
    }
    if config.keep_best:
        kept.update(islice(whole(sorted(losses, key=lambda path: losses[path]), damaged), 1))
    return [path for path in own if path not in kept]


def whole(checkpoints: Iterable[Path], damaged: Collection[Path]) -> Iterator[Path]:
    """Yield the `checkpoints` that are not in `damaged` and have all their files with their sizes."""
    for path in checkpoints:
        if path not in damaged:
            with suppress(CheckpointError):
                verify(path, hashes=False)
                yield path


def state_of(path: Path) -> dict[str, Any]:
    """Return the state.json of a checkpoint; empty if it is damaged."""
    try:
        return read_state(path)
    except CheckpointError:
        return {}


def measured(state: dict[str, Any]) -> bool:
    """Return whether a checkpoint's validation loss was measured at its own step, and is finite."""
    return state.get("val_loss") is not None and state.get("evaluated") == state.get("step")
