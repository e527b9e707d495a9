"""Finds the checkpoints of a training run: in its folder, and in a second folder for times when the first cannot be written.

`checkpoints` may lead out of the run's folder, and the second folder always lies elsewhere. A copy of the run's folder still
names these folders. So that two runs never share one, each such folder holds the file OWNER with the path of its run's folder.
The checkpoint folder belongs to that run as long as the path exists and still names the checkpoint folder. So a run that was
moved keeps its checkpoints.
"""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from celo2.training.folder import OWNER
from launch.checkpoint.tensors import is_there
from launch.checkpoint.verify import MANIFEST, MODEL, CheckpointError, find_checkpoint, list_checkpoints, step_of, verify
from launch.checkpoint.writer import Progress, no_progress

CHECKPOINTS = "checkpoints"
FALLBACK = "fallback_folder"  # a file in a run's folder with the path of the second folder, below `checkpoint.fallback_dir`
LONGEST = 8192  # bytes of OWNER that are read


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
    """Return the checkpoint folders of a run, as far as the run's folder itself names them, without another run's."""
    second = second_folder(run)
    own = second is not None and second.is_absolute() and other_owner(second, run) is None
    return [run / CHECKPOINTS, *([second] if second is not None and own else [])]


def names_folder(run: Path, folder: Path) -> bool:
    """Return whether the run's folder `run` leads to `folder` as one of its checkpoint folders."""
    second = second_folder(run)
    if second is not None and not second.is_absolute():  # of an earlier version, which stored only the name
        second = folder.with_name(second.name)
    return any(same_folder(named, folder) for named in (run / CHECKPOINTS, second) if named is not None)


def same_folder(one: Path, other: Path) -> bool:
    """Return whether two paths lead to the same folder."""
    try:
        return one.samefile(other)
    except (OSError, ValueError):  # one is missing or cannot be reached
        return False


def other_owner(folder: Path, run: Path, content: bytes | None = None) -> Path | None:
    """Return the folder of another run to which the checkpoint folder `folder` belongs; None if there is none.

    `content`: that of OWNER, if it is read already.
    """
    owner = owner_of(folder, content)
    try:
        taken = owner is not None and not same_folder(owner, run) and names_folder(owner, folder)
    except OSError:  # the owner names no path
        return None
    return owner if taken else None


def owner_of(folder: Path, content: bytes | None = None) -> Path | None:
    """Return the path in the OWNER of a checkpoint folder; None if there is none or it cannot be read.

    `content`: that of OWNER, if it is read already.
    """
    try:
        if content is None:
            if not (folder / OWNER).is_file():
                return None
            with (folder / OWNER).open("rb") as file:
                content = file.read(LONGEST)
    except OSError:
        return None
    owner = Path(os.fsdecode(content.removesuffix(b"\n").replace(b"\0", b"")))
    return owner if owner.is_absolute() else None


def require_own(folder: Path, run: Path, content: bytes | None = None) -> None:
    """Raise CheckpointError if the checkpoint folder `folder` of `run` belongs to another run.

    `content`: as for `other_owner`.
    """
    if (owner := other_owner(folder, run, content)) is not None:
        raise CheckpointError(
            f"{folder} leads to {folder.resolve()}, which holds the checkpoints of {owner}: choose another run.dir with "
            f"checkpoint.resume={owner}, or copy the checkpoints into a folder of its own and link that; if {run} replaces "
            f"{owner}, remove {folder / OWNER}"
        )


def claim(folder: Path, run: Path) -> None:
    """Write the path of `run` into the OWNER of a checkpoint folder outside of it. A disk that cannot be written is no error.

    Raises:
        CheckpointError: the folder belongs to another run.
    """
    with suppress(OSError):
        descriptor = os.open(folder / OWNER, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.lockf(descriptor, fcntl.LOCK_EX)  # until it is closed, so that one of two runs is the first
            content, own = os.read(descriptor, LONGEST), os.fsencode(run.resolve()) + b"\n"
            require_own(folder, run, content)
            if content != own:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, own, 0)
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_outside(run: Path) -> bool:
    """Return whether the checkpoints of a run lie outside its folder: on a disk that is mounted there, or where a link leads."""
    folder = run / CHECKPOINTS
    return folder.resolve() != run.resolve() / CHECKPOINTS or folder.is_mount()


def run_of(checkpoint: Path) -> Path:
    """Return the folder of the run that contains a checkpoint. For a copy elsewhere, return the copy itself."""
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == CHECKPOINTS else checkpoint


def newest_of_original(run: Path) -> list[tuple[Path, Path]]:
    """Return, for a copy of a run, the newest checkpoint in the original's second folder, and the original's folder.

    Empty if `run` is no copy, or if there is no such checkpoint.
    """
    second = second_folder(run)
    if second is None or not second.is_absolute() or (owner := other_owner(second, run)) is None:
        return []
    return [(newest, owner) for newest in list_checkpoints(second)[-1:]]


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
    problems += [
        f"{newest} is newer, but belongs to {owner}, of which {path} is a copy"
        for newest, owner in newest_of_original(path)
        if step_of(newest) > step_of(checkpoint)
    ]
    return Chosen(checkpoint, path, problems)
