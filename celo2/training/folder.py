"""Check the folder of a training run: nothing in it may make the run write elsewhere, or belong to another program.

Archives may contain links. If metrics.jsonl were a link to a user's file, the run would overwrite that file.
"""

from __future__ import annotations

import os
import stat
from dataclasses import fields
from pathlib import Path

from celo2.training.configuration import renamed
from celo2.training.metrics import read_metrics
from celo2.training.yaml_values import ConfigError, is_null, read_yaml_file

CHECKPOINTS = "checkpoints"
OWNER = "owner"  # a file in a folder of checkpoints outside its run's folder: the path of the run's folder
RULE = "rule.safetensors"


class UnsafeFolder(OSError):
    """The folder of a run is a file, or holds something that must not be there. The message names it and the remedy."""


def check_no_file(folder: Path) -> None:
    """Raise UnsafeFolder if `folder` cannot be created because it or one of its parents is a file or a broken link. It may be
    missing."""
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():
            raise UnsafeFolder(
                f"{path} is a link to {os.readlink(path)}, which is missing: mount what it leads to, or remove the link"
            )
        if path.exists() and not path.is_dir():
            raise UnsafeFolder(f"{path} is a file, expected a folder or a name that is free")


def check_folder(folder: Path) -> None:
    """Raise UnsafeFolder for a link out of `folder`, and for anything that is neither a file nor a folder, as a pipe or a device.

    The folder itself may be a link, since its name comes from the user. `checkpoints` in it may also be a link, because users
    move it to larger disks; it must lead to checkpoints outside any other run's folder. The contents of the folders of W&B,
    TensorBoard and checkpoints are not checked.
    """
    inside = folder.resolve()
    aside = folder / "set_aside"
    runs = [
        folder,
        folder / "rules",
        folder / "profile",
        aside,
        *(aside.iterdir() if aside.is_dir() and not aside.is_symlink() else ()),
    ]
    for path in (path for run in runs if run.is_dir() for path in run.iterdir()):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
            raise UnsafeFolder(f"{path} is neither a file nor a folder: remove it")
        if stat.S_ISLNK(mode) and not leads_inside(path, inside) and not (path.name == CHECKPOINTS and holds_checkpoints(path)):
            lost = path.name == CHECKPOINTS and not path.exists()
            remedy = "mount what it leads to, or remove the link" if lost else "remove the link"
            raise UnsafeFolder(
                f"{path} is a link to {os.readlink(path)}, out of the run's folder, where the run would write: {remedy}"
            )


def leads_inside(link: Path, folder: Path) -> bool:
    """Whether a link leads to a path within the resolved `folder`."""
    try:
        return link.resolve().is_relative_to(folder)
    except (OSError, RuntimeError):  # the link leads in a circle
        return False


def holds_checkpoints(path: Path) -> bool:
    """Whether `path` is or leads to a folder of checkpoints, or an empty folder, that is not in another run's folder."""
    if not path.is_dir() or (path.resolve().parent / "metrics.jsonl").exists():
        return False
    return all(
        entry.name.lstrip(".").startswith("step_") or entry.is_symlink() or (entry.name == OWNER and entry.is_file())
        for entry in path.iterdir()
    )


def check_own(folder: Path, schema: type, number: str, state: str, *others: str) -> None:
    """Raise UnsafeFolder if a run would replace files in `folder` that do not belong to such a run.

    Args:
        folder: may be missing.
        schema: the schema of the run's configuration; a config.yaml of the run has only sections of this schema.
        number: "step" or "iteration", the key that every record in the run's metrics has.
        state: where such a run keeps its state. If this exists, an unreadable config.yaml counts as the run's own.
        others: further files that such a run writes before its rule.
    """
    config, metrics, rule = (folder / name for name in ("config.yaml", "metrics.jsonl", RULE))
    signs = (state, *others)
    if config.exists() and not is_of(schema, config, unreadable=(folder / state).exists()):
        raise foreign(config)
    if not all(number in record for record in read_metrics(metrics)):
        raise foreign(metrics)
    if rule.exists() and not any((folder / sign).exists() for sign in signs):
        raise UnsafeFolder(
            f"{folder} holds {RULE}, which the run would replace, but no {' or '.join(signs)}: bring that back, or choose "
            "another run.dir"
        )


def is_of(schema: type, path: Path, unreadable: bool) -> bool:
    """Whether all keys of a configuration are sections or old keys of the schema; returns `unreadable` if it cannot be read."""
    try:
        tree = read_yaml_file(path)
    except (ConfigError, RecursionError):
        return unreadable
    known = {section.name for section in fields(schema)} | renamed(schema).keys()
    return is_null(tree) or (isinstance(tree, dict) and tree.keys() <= known)


def foreign(path: Path) -> UnsafeFolder:
    """The error for a file that belongs to another program."""
    return UnsafeFolder(f"{path} is not of a run of this program, which would replace it: choose another run.dir")
