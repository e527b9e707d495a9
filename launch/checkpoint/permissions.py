"""Repairs file permissions: safetensors writes files that only their owner can read."""

from pathlib import Path


def usual_permissions(folder: Path) -> None:
    """Give every file in `folder` the permissions that a new file there gets from the umask and the folder."""
    probe = folder / ".permissions"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.iterdir():
        if file.is_file() and file.stat().st_mode & 0o777 != mode:
            file.chmod(mode)
