"""Files that only grow while a training run goes, and that a full disk neither ends nor damages."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from data.files import no_link


class GrowingFile:
    """A file that only grows, by whole records. One that does not fit on the disk waits in memory, and goes with the next one.

    Any thread may call it. One warning names the file, until there is space again. `what` is the file's records in words.
    """

    def __init__(self, path: Path, say: Callable[[str], None], what: str) -> None:
        self.path, self.say, self.what = path, say, what
        self.waiting: list[bytes] = []
        self.lock = threading.Lock()

    def append(self, record: bytes) -> None:
        """Append one record, after those that wait."""
        with self.lock:
            failed = bool(self.waiting)
            self.waiting.append(record)
            error = self._append()
        if error and not failed:
            self.say(
                f"warning: {self.path} cannot be written ({error.strerror}); its {self.what} wait until it can, the run goes on"
            )
        elif failed and not error:
            self.say(f"{self.path} can be written again; nothing is lost")

    def flush(self) -> None:
        """Make the operating system write the file to the disk, with what waits, as far as it can."""
        with self.lock, suppress(OSError):
            if not self._append() and self.path.exists():
                with open(self.path, "ab", opener=no_link) as file:
                    os.fsync(file.fileno())

    def before(self, size: int) -> bytes:
        """What must be written before the next record to a file of `size` bytes."""
        return b""

    def _append(self) -> OSError | None:
        """Append what waits. Where it does not fit, the file ends as before, at the end of a record."""
        if not self.waiting:
            return None
        try:
            with open(self.path, "ab", buffering=0, opener=no_link) as file:
                size = file.seek(0, os.SEEK_END)
                data = self.before(size) + b"".join(self.waiting)
                try:
                    while data:
                        data = data[file.write(data) :]
                except OSError:
                    with suppress(OSError):
                        file.truncate(size)
                    raise
        except OSError as error:
            return error
        self.waiting.clear()
        return None
