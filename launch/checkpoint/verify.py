"""Finds checkpoints by name, and verifies that they are whole: every file of the manifest exists with its size and hash."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.files import read_json
from launch.checkpoint.tensors import INDEX, part_name
from launch.checkpoint.writer import Progress, no_progress

MANIFEST = "manifest.json"
MODEL, OPTIMIZER, AVERAGE = "model.safetensors", "optimizer.safetensors", "average.safetensors"  # AVERAGE: only if there is one
FILES = ("config.json", MODEL, OPTIMIZER, "state.json")  # files of a checkpoint; tensors may be divided over several files
WHOLES = (MODEL, OPTIMIZER, AVERAGE)
PART = re.compile(r"(model|optimizer|average)-([0-9]{5})-of-([0-9]{5})\.safetensors")  # Hugging Face's format
READERS, READ = 8, 8 << 20  # number of files that are hashed at once, and bytes of each read


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or exported. The message names it."""


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint of a step."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint; -1 for any other name, such as that of a copy."""
    digits = re.fullmatch(r"step_([0-9]+)", path.name)
    step = int(digits[1]) if digits else -1
    return step if path.name == checkpoint_name(step) else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first, whether they are whole or not.

    Copies under other names, links and empty folders do not count.
    """
    found = (path for path in folder.glob("step_*") if step_of(path) >= 0 and path.is_dir() and not path.is_symlink())
    return sorted((path for path in found if any(path.iterdir())), key=step_of)


def find_checkpoint(*folders: Path, progress: Progress = no_progress) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint in `folders` (None if there is none), and what is wrong with newer ones.

    If two folders have the same step, the first folder's checkpoint is tried first.
    """
    problems: list[str] = []
    found = [path for folder in folders for path in list_checkpoints(folder)]
    for path in sorted(found, key=step_of, reverse=True):
        try:
            verify(path, progress=progress)
            require_its_step(path)
            return path, problems
        except CheckpointError as error:
            problems.append(str(error))
    return None, problems


def verify(path: Path, hashes: bool = True, progress: Progress = no_progress) -> None:
    """Raise CheckpointError unless the manifest lists exactly the files of the checkpoint, with their sizes and hashes.

    `hashes`: whether to compare the hashes, too.
    """
    try:
        manifest = read_json(path / MANIFEST)
        if wrong := wrong_names(manifest, checkpoint_files(path)):
            raise CheckpointError(f"{path / MANIFEST} {'; '.join(wrong[:3])}")
        for name, expected in manifest.items():
            file = path / name
            if not stat.S_ISREG(file.stat().st_mode):
                raise CheckpointError(f"{file} is not a file")
            if file.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{file} has {file.stat().st_size} bytes, its manifest says {expected['bytes']}")
        found = hash_files([path / name for name in manifest], progress) if hashes else {}
        for name, expected in manifest.items():
            if hashes and found[path / name] != expected["sha256"]:
                raise CheckpointError(f"{path / name} is damaged: its sha256 is not the manifest's")
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read ({error})") from None


def is_checkpoint_file(name: str) -> bool:
    """Return whether a file of this name may belong to a checkpoint."""
    return name in FILES or name in (AVERAGE, *(whole + INDEX for whole in WHOLES)) or PART.fullmatch(name) is not None


def checkpoint_files(path: Path) -> list[str]:
    """Return the names of the checkpoint files in a folder, without the manifest."""
    return sorted(file.name for file in path.iterdir() if is_checkpoint_file(file.name))


def wrong_names(manifest: Iterable[str], present: Iterable[str]) -> list[str]:
    """Return what is wrong with the file names in a manifest, for a folder with the files `present`."""
    listed = set(manifest)
    wrong = [f"names {name!r}, which is not a file of a checkpoint" for name in listed if not is_checkpoint_file(name)]
    wrong += [f"lacks {name}" for name in present if name not in listed]
    for whole in WHOLES:
        parts = [match for name in listed if (match := PART.fullmatch(name)) and whole.startswith(f"{match[1]}.")]
        totals = {int(match[3]) for match in parts}
        needed = {part_name(whole, n, max(totals)) for n in range(1, max(totals) + 1)} | {whole + INDEX} if totals else set()
        wrong += [f"lacks {name}" for name in sorted(needed - listed)]
        if len(totals) > 1 or (listed & {whole} and listed & {whole + INDEX}) or (whole + INDEX in listed and not totals):
            wrong.append(f"names {whole} in two forms")
    return wrong


def hash_files(files: Collection[Path], progress: Progress = no_progress) -> dict[Path, str]:
    """Return the sha256 of each file. Several are read at once, since hashing releases the GIL."""
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
        return dict(zip(files, pool.map(lambda file: sha256(file, progress), files), strict=True))


def require_its_step(path: Path) -> None:
    """Raise CheckpointError if the step in a checkpoint's name differs from the step in its state, as after renaming a copy."""
    state = path / "state.json"
    try:
        step = read_json(state)["step"] if state.exists() else step_of(path)
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{state} does not say its step") from None
    if step != step_of(path):
        raise CheckpointError(f"{path} is a copy of step {step} under the name of another step")


def sha256(path: Path, progress: Progress = no_progress) -> str:
    """Return the sha256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while data := file.read(READ):
            digest.update(data)
            progress()
    return digest.hexdigest()
