"""Decides which checkpoints of a training run are deleted when a new one is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.schema import Checkpoint as CheckpointConfig
from launch.checkpoint.state import read_state
from launch.checkpoint.verify import MANIFEST, CheckpointError, list_checkpoints, step_of


def surplus(newest: Path, config: CheckpointConfig, origin: int | None = None, others: Sequence[Path] = ()) -> list[Path]:
    """Return the checkpoints to delete after `newest` was written, from its folder and the folders `others`.

    Kept are: the newest `keep` up to this step; milestones, whose step is a multiple of `keep_every` now or was when they were
    written; with `keep_best`, the checkpoint with the lowest validation loss; and step `origin`, from which the run branched.
    Checkpoints of steps after `newest`, and folders that lack a checkpoint's name or manifest, are neither counted nor deleted.
    """
    found = [path for folder in (newest.parent, *others) for path in list_checkpoints(folder)]
    own = sorted((path for path in found if step_of(path) <= step_of(newest) and (path / MANIFEST).exists()), key=step_of)
    states = {path: state_of(path) for path in own}
    kept = set(own[-config.keep :])
    for path, state in states.items():
        intervals = (config.keep_every, state.get("config", {}).get("checkpoint", {}).get("keep_every", 0))
        if step_of(path) == origin or any(every and step_of(path) % every == 0 for every in intervals):
            kept.add(path)
    losses = {path: state["val_loss"] for path, state in states.items() if measured(state)}
    if config.keep_best and losses:
        kept.add(min(losses, key=lambda path: losses[path]))
    return [path for path in own if path not in kept]


def state_of(path: Path) -> dict[str, Any]:
    """Return the state.json of a checkpoint; empty if it is damaged."""
    try:
        return read_state(path)
    except CheckpointError:
        return {}


def measured(state: dict[str, Any]) -> bool:
    """Return whether a checkpoint's validation loss was measured at its own step, and is finite."""
    return state.get("val_loss") is not None and state.get("evaluated") == state.get("step")
