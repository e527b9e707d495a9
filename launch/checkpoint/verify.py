"""Which checkpoints of a training run are whole: every file of the manifest is there, with its size and hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or exported. The message names it."""


def list_checkpoints(folder: Path) -> list[Path]:
    """The folders `step_*` in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def find_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder`, and what is wrong with the newer ones."""
    problems: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            verify(path)
            return path, problems
        except CheckpointError as error:
            problems.append(str(error))
    return None, problems


def verify(path: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its size and hash."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            file = path / name
            if file.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{file} has {file.stat().st_size} bytes, its manifest says {expected['bytes']}")
            if sha256(file) != expected["sha256"]:
                raise CheckpointError(f"{file} is damaged: its sha256 is not the manifest's")
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is no whole checkpoint: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read ({error})") from None


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
