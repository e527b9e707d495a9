"""Files that are whole and on the disk once they are there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path`, NAME.PID.tmp, that takes its place when the block ends, and goes after an error."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            yield file
            sync(file)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def sync(file: BinaryIO) -> None:
    """Returns when the file is on the disk."""
    file.flush()
    os.fsync(file.fileno())
