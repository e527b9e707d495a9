"""Reads pieces of shard files, and notices files that change during the run: overwritten, cut short, or replaced.

Files are read, not mapped into memory. With a mapping, access beyond the end of a shortened file would kill the process (SIGBUS).
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from data import DataError

OPEN = 128  # most files that are open at the same time; the limit of a process is often 1,024


class ShardFile(NamedTuple):
    """A file as the index describes it."""

    path: Path
    size: int  # bytes
    sha256: str


class ShardFiles:
    """The files of a split. Construct it before comparing the files' hashes, so that no later change is missed."""

    def __init__(self, files: Sequence[ShardFile]):
        self.files = list(files)
        self._stamps = [stamp(os.stat(file.path)) for file in self.files]
        self._open = lru_cache(OPEN)(_Descriptor)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset` on of the file `number`. Raises DataError if the file does not match the index."""
        file = self.files[number]
        if offset + size > file.size:
            raise DataError(
                f"{file.path}: has {file.size:,} bytes, but its index counts on {offset + size:,}: prepare the data again"
            )
        while True:
            try:
                descriptor = self._open(file.path).number
                found = os.pread(descriptor, size, offset)
                if len(found) == size and stamp(os.fstat(descriptor)) == self._stamps[number]:
                    return found
                self._stamps[number] = stamp_of_same(file)
            except OSError as error:
                raise DataError(f"{file.path}: cannot be read any more ({error.strerror})") from None
            self._open.cache_clear()


def stamp(status: os.stat_result) -> tuple[int, int]:
    """Return the size and the modification time of a file, which change when the file is written to."""
    return status.st_size, status.st_mtime_ns


def stamp_of_same(file: ShardFile) -> tuple[int, int]:
    """Return the new stamp of a file that was written to, if its content still matches the index.

    Raises:
        DataError: the content does not match.
    """
    with open(file.path, "rb") as opened:
        now = stamp(os.fstat(opened.fileno()))
        same = now[0] == file.size and hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256
    if not same:
        what = f"it has {now[0]:,} bytes instead of {file.size:,}" if now[0] != file.size else "its tokens are others"
        raise DataError(
            f"{file.path}: changed while it was in use: {what}; restore it, and the same command continues from the newest "
            "checkpoint"
        )
    return now


class _Descriptor:
    """An open file that closes itself when nothing refers to it any more."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone when the process ends
        if hasattr(self, "number"):
            close(self.number)
