"""Writes files atomically: a file appears only when it is whole and flushed to disk. Links are replaced, never followed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside `path`, NAME.PID.tmp. It replaces `path` when the block ends, and is deleted after an error.

    If `path` is a link, the file replaces the link, and the target of the link does not change.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.unlink(missing_ok=True)
    try:
        with open(aside, "xb") as file:
            yield file
            sync(file)
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk
        raise


def replace_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 by `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises ValueError for any invalid file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def no_link(path: str, flags: int) -> int:
    """An `opener` for `open` that raises OSError if the file is a link, so that nothing is appended to another file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def sync(file: BinaryIO) -> None:
    """Flush a file to disk."""
    file.flush()
    os.fsync(file.fileno())
