"""Reads pieces of shard files, and notices files that change meanwhile: overwritten, cut short, or replaced.

Pieces are read, not mapped into memory: behind the end of a file that was cut short, a mapping ends the process with SIGBUS.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from data import DataError

OPEN = 128  # files that are open at a time; a process may often have no more than 1,024


class ShardFile(NamedTuple):
    """A file as the index describes it."""

    path: Path
    size: int  # bytes
    sha256: str


class ShardFiles:
    """The files of a split. Make it before their hashes are compared, so that no later change is missed."""

    def __init__(self, files: Sequence[ShardFile]):
        self.files = list(files)
        self._stamps = [stamp(os.stat(file.path)) for file in self.files]
        self._open = lru_cache(OPEN)(_Descriptor)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on of the file `number`. DataError if they may no longer be what the index describes."""
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
    """What changes when a file is written to: its size, and when that was."""
    return status.st_size, status.st_mtime_ns


def stamp_of_same(file: ShardFile) -> tuple[int, int]:
    """The stamp of a file that was written to since it was opened, if what it holds is still what the index describes.

    Raises:
        DataError: it is not.
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
    """An open file, which closes itself when nothing uses it any more."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at the end of the process there is no `os` any more
        if hasattr(self, "number"):
            close(self.number)
