"""Finds the checkpoints of a training run: in its folder, and in a second folder for times when the first cannot be written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from launch.checkpoint.tensors import is_there
from launch.checkpoint.verify import MANIFEST, MODEL, CheckpointError, find_checkpoint, list_checkpoints, verify
from launch.checkpoint.writer import Progress, no_progress

CHECKPOINTS = "checkpoints"
FALLBACK = "fallback_folder"  # a file in a run's folder with the path of the second folder, below `checkpoint.fallback_dir`


class Chosen(NamedTuple):
    """A whole checkpoint and its run."""

    path: Path
    run: Path  # the folder with its tokenizer, rule and metrics
    problems: list[str]  # what is wrong with newer checkpoints


def second_folder(run: Path) -> Path | None:
    """Return the folder that FALLBACK names: a path or, from earlier versions, only a name. None if there is no valid one."""
    file = run / FALLBACK
    text = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
    return Path(text) if re.fullmatch(r"(/([^\0\n]*/)?)?[^/\\\0\n]+-[0-9a-f]{12}", text) else None


def folders_of(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, as far as the run's folder itself names them."""
    second = second_folder(run)
    return [run / CHECKPOINTS, *([second] if second is not None and second.is_absolute() else [])]


def run_of(checkpoint: Path) -> Path:
    """Return the folder of the run that contains a checkpoint. For a copy elsewhere, return the copy itself."""
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == CHECKPOINTS else checkpoint


def choose_checkpoint(path: Path, progress: Progress = no_progress) -> Chosen:
    """Return the checkpoint `path` or, if `path` is a run's folder, its newest whole checkpoint.

    Raises:
        CheckpointError: `path` is neither, or there is no whole checkpoint.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no folder {path}")
    if (path / MANIFEST).exists() or is_there(path / MODEL):
        verify(path, progress=progress)
        return Chosen(path, run_of(path), [])
    checkpoint, problems = find_checkpoint(*folders_of(path), progress=progress)
    if checkpoint is None:
        if beside := list_checkpoints(path):
            run = f", or the run {path.parent}" if path.name == CHECKPOINTS else ""
            problems.append(f"name a checkpoint in it, such as {beside[-1]}{run}")
        raise CheckpointError("; ".join([f"{path} holds no whole checkpoint ({CHECKPOINTS}/step_*)", *problems]))
    return Chosen(checkpoint, path, problems)
