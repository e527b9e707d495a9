"""What a training run's folder may hold, so that a folder from somebody else cannot make the run write elsewhere.

Archives carry links. A link named metrics.jsonl that leads to a file of the user's would be written through.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

CHECKPOINTS = "checkpoints"


class UnsafeFolder(OSError):
    """A run's folder that is a file, or holds what must not be there. The message names it and the remedy."""


def check_no_file(folder: Path) -> None:
    """Raise UnsafeFolder if `folder`, which may be missing, cannot be made because a file stands there or further up."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UnsafeFolder(f"{path} is a file, expected a folder or a name that is free")


def check_folder(folder: Path) -> None:
    """Raise UnsafeFolder for a link out of `folder`, and for whatever is neither a file nor a folder, as a pipe or a device.

    The folder itself may be a link, since its name comes from the user. So may `checkpoints` in it, which people move to a
    larger disk, if it leads to checkpoints and not into another run's folder. What W&B, TensorBoard and checkpoints keep in
    their own folders is not looked at.
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
    """Whether a link leads to something within the resolved `folder`."""
    try:
        return link.resolve().is_relative_to(folder)
    except (OSError, RuntimeError):  # in a circle
        return False


def holds_checkpoints(path: Path) -> bool:
    """Whether `path` leads to a folder of checkpoints, or an empty one, that is not in another run's folder."""
    if not path.is_dir() or (path.resolve().parent / "metrics.jsonl").exists():
        return False
    return all(entry.name.lstrip(".").startswith("step_") or entry.is_symlink() for entry in path.iterdir())
