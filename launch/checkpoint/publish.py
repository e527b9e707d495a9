"""The first rank's part of a checkpoint: make a temporary folder, write index and manifest, rename; and clean up after a kill."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path

from configs.schema import Checkpoint as CheckpointConfig
from launch.checkpoint.retention import surplus
from launch.checkpoint.snapshot import Snapshot
from launch.checkpoint.tensors import INDEX, make_index
from launch.checkpoint.verify import MANIFEST, PART, checkpoint_name, sha256, step_of
from launch.checkpoint.writer import Written, write_small

SPARE_BYTES = 64 << 20  # must stay free on the disk after a checkpoint; on a small disk, a twentieth of its size
Announce = Callable[[str], None]  # called with a phase of `launch.checkpoint.save.PHASES` before the phase begins


def temporary_folder(folder: Path, step: int) -> Path:
    """Return the folder in which the files of a checkpoint lie until all are written. Does not create it."""
    return folder / f".{checkpoint_name(step)}.tmp"


def begin(folder: Path, step: int, tensor_bytes: int) -> None:
    """Make an empty temporary folder. Raises OSError if the disk has no space for `tensor_bytes`."""
    temporary = temporary_folder(folder, step)
    remove(temporary)
    temporary.mkdir(parents=True)
    disk = shutil.disk_usage(folder)
    needed = tensor_bytes + min(SPARE_BYTES, disk.total // 20)
    if disk.free < needed:
        raise OSError(f"no space left: {needed / 1e9:.3g} GB needed, {disk.free / 1e9:.3g} GB free")


def publish(
    folder: Path,
    snapshot: Snapshot,
    written: Sequence[Written],
    config: CheckpointConfig,
    announce: Announce,
    origin: int | None,
    others: Sequence[Path],
    damaged: Collection[Path] = (),
) -> tuple[Path, int]:
    """Complete a checkpoint, rename it to its final name, and delete the checkpoints that `surplus` returns.

    `written`: the files with its tensors. `others`: further folders with checkpoints of the same run. `damaged`: checkpoints that
    are known to be damaged. Returns the checkpoint and its bytes.
    """
    step = snapshot.state["step"]
    temporary, target = temporary_folder(folder, step), folder / checkpoint_name(step)
    for file in written:
        found = (temporary / file.name).stat().st_size
        if found != file.bytes:
            raise OSError(f"{temporary / file.name} has {found} bytes here, {file.bytes} where it was written")
    announce("manifest")
    small = {"config.json": snapshot.config, "state.json": json.dumps(snapshot.state, indent=1)} | indexes(written)
    files = [*written, *(write_small(temporary / name, content) for name, content in small.items())]
    manifest = {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in sorted(files)}
    write_small(temporary / MANIFEST, json.dumps(manifest, indent=1))
    flush(temporary)
    announce("rename")
    replaced = folder / f".{target.name}.old"
    if os.path.lexists(target):  # a checkpoint of the same step: damaged, or written again after a rollback
        remove(replaced)
        target.rename(replaced)
    temporary.rename(target)
    flush(folder)
    announce("deletion of old checkpoints")
    remove(replaced)
    for old in surplus(target, config, origin, others, set(damaged) - {target}):
        discard(old)
    return target, sum(file.bytes for file in files)


def indexes(written: Sequence[Written]) -> dict[str, str]:
    """Return the indexes, by file name, for tensors that are divided over several files."""
    divided: dict[str, list[Written]] = defaultdict(list)
    for file in written:
        if match := PART.fullmatch(file.name):
            divided[f"{match[1]}.safetensors"].append(file)
    return {
        whole + INDEX: make_index({file.name: file.tensors for file in sorted(files)}, sum(file.tensor_bytes for file in files))
        for whole, files in divided.items()
    }


def write_manifest(folder: Path) -> None:
    """Write the manifest of the files that are in `folder`."""
    manifest = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def remove_leftovers(folder: Path) -> None:
    """Clean up after a process that was killed while writing: restore a replaced checkpoint, remove temporary folders."""
    for replaced in folder.glob(".step_*.old"):
        target = folder / replaced.name[1 : -len(".old")]
        if not target.exists():
            replaced.rename(target)
    for leftover in folder.glob(".step_*"):
        remove(leftover)


def remove(path: Path) -> None:
    """Remove a folder, or a link but not its target. Errors are ignored."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint. If that is not permitted, for example on a disk that has become read-only, it stays whole."""
    leftover = temporary_folder(checkpoint.parent, step_of(checkpoint))
    with suppress(OSError):
        remove(leftover)
        checkpoint.rename(leftover)
        remove(leftover)


def flush(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
