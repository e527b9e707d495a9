"""Files that only grow during a training run. A full disk neither stops the run nor damages them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from data.files import no_link


class GrowingFile:
    """A file that only grows, by whole records. A record that does not fit on the disk waits in memory until the next write.

    Any thread may call it. While there is no space, a single warning names the file. `what` names the records in this warning.
    """

    def __init__(self, path: Path, say: Callable[[str], None], what: str) -> None:
        self.path, self.say, self.what = path, say, what
        self.waiting: list[bytes] = []
        self.lock = threading.Lock()

    def append(self, record: bytes) -> None:
        """Append one record, after the waiting ones."""
        with self.lock:
            failed = bool(self.waiting)
            self.waiting.append(record)
            error = self._append()
        if error and not failed:
            self.say(
                f"warning: {self.path} cannot be written ({error.strerror}); the run continues and "
                f"keeps its {self.what} in memory until the file can be written"
            )
        elif failed and not error:
            self.say(f"{self.path} can be written again; nothing is lost")

    def flush(self) -> None:
        """Append the waiting records if they fit, and make the operating system write the file to the disk."""
        with self.lock, suppress(OSError):
            if not self._append() and self.path.exists():
                with open(self.path, "ab", opener=no_link) as file:
                    os.fsync(file.fileno())

    def before(self, size: int) -> bytes:
        """What must be written before the next record to a file of `size` bytes."""
        return b""

    def _append(self) -> OSError | None:
        """Append the waiting records. If they do not fit, the file keeps its old end, the end of a record. Returns the error."""
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
