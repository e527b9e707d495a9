"""Files that are whole and on the disk once they are there, and that are never written through a link."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path`, NAME.PID.tmp, that takes its place when the block ends, and goes after an error.

    Where `path` is a link, the link goes, and what it leads to stays as it is.
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
    """Write a text, in UTF-8, as `replacing` does."""
    with replacing(path) as file:
        file.write(text.encode())


def read_json(path: Path) -> Any:
    """What a file of JSON says. ValueError for a file that is none, however it was made."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def no_link(path: str, flags: int) -> int:
    """An `opener` for `open`, which raises OSError where the file is a link: what is appended must not go elsewhere."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def sync(file: BinaryIO) -> None:
    """Returns when the file is on the disk."""
    file.flush()
    os.fsync(file.fileno())
