"""What is a checkpoint, by its name, and which are whole: every file of the manifest is there, with its size and hash."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Callable
from pathlib import Path

MANIFEST = "manifest.json"
PIECE = 16 << 20  # bytes that are hashed at once
Progress = Callable[[], None]  # called as long as something works
FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "state.json")  # what it may list


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or exported. The message names it."""


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint; -1 for any other name, such as a copy's."""
    digits = re.fullmatch(r"step_([0-9]+)", path.name)
    step = int(digits[1]) if digits else -1
    return step if path.name == checkpoint_name(step) else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder` by their names, oldest first, whole or not.

    Only what this project itself wrote counts: no copy under another name, no link, no empty folder.
    """
    found = (path for path in folder.glob("step_*") if step_of(path) >= 0 and path.is_dir() and not path.is_symlink())
    return sorted((path for path in found if any(path.iterdir())), key=step_of)


def find_checkpoint(folder: Path, progress: Progress = lambda: None) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder`, and what is wrong with the newer ones. `progress` is called on the way."""
    problems: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            verify(path, progress=progress)
            require_its_step(path)
            return path, problems
        except CheckpointError as error:
            problems.append(str(error))
    return None, problems


def choose_checkpoint(run: Path, progress: Progress = lambda: None) -> tuple[Path, list[str]]:
    """`run` if it is a checkpoint, or else the newest whole one in it, and what is wrong with newer ones."""
    if not run.is_dir():
        raise CheckpointError(f"there is no folder {run}")
    if (run / MANIFEST).exists() or (run / "model.safetensors").exists():
        verify(run, progress=progress)
        return run, []
    checkpoint, problems = find_checkpoint(run / "checkpoints", progress)
    if checkpoint is None:
        raise CheckpointError("; ".join([f"{run} holds no whole checkpoint (checkpoints/step_*)", *problems]))
    return checkpoint, problems


def verify(path: Path, hashes: bool = True, progress: Progress = lambda: None) -> None:
    """Raise CheckpointError unless the manifest lists just those of FILES that are there, with their sizes and `hashes`."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        wrong = [f"names {name!r}, which is no file of a checkpoint" for name in manifest if name not in FILES]
        wrong += [f"lacks {name}" for name in FILES if name not in manifest and (path / name).exists()]
        if wrong:
            raise CheckpointError(f"{path / MANIFEST} {'; '.join(wrong[:3])}")
        for name, expected in manifest.items():
            file = path / name
            if not stat.S_ISREG(file.stat().st_mode):
                raise CheckpointError(f"{file} is no file")
            if file.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{file} has {file.stat().st_size} bytes, its manifest says {expected['bytes']}")
            if hashes and sha256(file, progress) != expected["sha256"]:
                raise CheckpointError(f"{file} is damaged: its sha256 is not the manifest's")
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is no whole checkpoint: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read ({error})") from None


def require_its_step(path: Path) -> None:
    """Raise CheckpointError if a whole checkpoint was renamed: its name says another step than its state."""
    state = path / "state.json"
    try:
        step = json.loads(state.read_text(encoding="utf-8"))["step"] if state.exists() else step_of(path)
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{state} does not say its step") from None
    if step != step_of(path):
        raise CheckpointError(f"{path} is a copy of step {step} under the name of another step")


def sha256(path: Path, progress: Progress = lambda: None) -> str:
    """The hash of a file, in hexadecimal digits. `progress` is called after every piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            progress()
    return digest.hexdigest()
