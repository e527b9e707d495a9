"""Documents (str) out of the pieces of a source, one at a time: memory is bounded by one document.

- text: a file of at most LARGE_TEXT bytes is one document.
- large text: document k begins after the first blank line at or after byte k * WINDOW; where the next WINDOW bytes have
  none, after their first line end; where they have neither, at the next whole character. So a document has at most
  2 * WINDOW bytes, the documents together are the file, and each is found without reading the file from its start.
- JSON lines, Parquet and hub data sets: the string under the text key of a row; null is an empty document. A gzip file
  cannot be read from its middle, so each is one unit: many of them are read in parallel, a single one is not.
Documents of white space alone are left out.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from data import DataError
from data.preparation.hub import hub_rows
from data.preparation.sources import WINDOW, Piece, Unit
from data.preparation.stdlib import stdlib_topics

SAMPLE_CHARACTERS = 32 * 2**20  # text that a tokenizer is trained on
SAMPLE_UNITS = 32  # taken from so many places at most
CONTINUATION = bytes(range(0x80, 0xC0))  # every byte of a UTF-8 character but its first
BLANK_LINE = re.compile(rb"\n\s*\n")


def documents(unit: Unit, text_key: str = "text") -> Iterator[str]:
    """The documents of one unit, in order. DataError names the file, and the place in it where something is wrong."""
    for piece in unit:
        try:
            for text in READERS[piece.kind](piece, text_key):
                if not isinstance(text, str):
                    raise DataError(f"{piece.path}: {text_key!r} holds {type(text).__name__}, not text")
                if text and not text.isspace():
                    yield _without_surrogates(text)
        except OSError as error:
            raise DataError(f"{piece.path}: {error.strerror or error}") from None


def sample(units: list[Unit], text_key: str = "text", limit: int = SAMPLE_CHARACTERS) -> Iterator[str]:
    """At most `limit` characters of documents: the equally long beginnings of SAMPLE_UNITS units, evenly spread."""
    count = min(len(units), SAMPLE_UNITS)
    chosen = [units[i * len(units) // count] for i in range(count)]
    for unit in chosen:
        left = limit // len(chosen)
        for text in documents(unit, text_key):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


def _read_text(piece: Piece, _: str) -> Iterator[str]:
    yield _decode(Path(piece.path).read_bytes(), piece.path, 0)


def _read_large_text(piece: Piece, _: str) -> Iterator[str]:
    with open(piece.path, "rb") as file:
        begin = _boundary(file, piece.start)
        for cut in range(piece.start + WINDOW, piece.stop + WINDOW, WINDOW):
            end = _boundary(file, cut)
            file.seek(begin)
            yield _decode(file.read(end - begin), piece.path, begin)
            begin = end


def _boundary(file: BinaryIO, position: int) -> int:
    """Where the document of the window at `position` begins: within WINDOW bytes after it."""
    if position == 0:
        return 0
    file.seek(position)
    window = file.read(WINDOW)
    if match := BLANK_LINE.search(window) or re.search(rb"\n", window):
        return position + match.end()
    rest = window[:3]  # a character that began before ends within these
    return position + len(rest) - len(rest.lstrip(CONTINUATION))


def _decode(data: bytes, path: str, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text at byte {offset + error.start}; convert it, or leave it out with a glob"
        ) from None


def _read_topics(piece: Piece, _: str) -> Iterator[str]:
    yield from stdlib_topics()


def _read_json_lines(piece: Piece, key: str) -> Iterator[str]:
    """The lines that begin within [start, stop)."""
    with open(piece.path, "rb") as file:
        position = max(piece.start - 1, 0)
        file.seek(position)
        if piece.start:
            position += len(file.readline())
        while position < piece.stop and (line := file.readline()):
            yield _json_text(line, key, f"{piece.path}: byte {position}")
            position += len(line)


def _read_json_lines_gzip(piece: Piece, key: str) -> Iterator[str]:
    try:
        with gzip.open(piece.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield _json_text(line, key, f"{piece.path}: line {number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{piece.path}: damaged gzip file: {error}") from None


def _json_text(line: bytes, key: str, place: str) -> str:
    """The text of one line; an empty line is an empty document."""
    if line.isspace():
        return ""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place} is not a JSON line: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{place} holds {type(row).__name__}, not a JSON object with the key {key!r}")
    return _value(row, key, place)


def _read_parquet(piece: Piece, key: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(piece.path) as file:
            _check_key(file.schema_arrow.names, key, piece.path)
            groups = range(piece.start, piece.stop)
            for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[key], use_threads=False):
                for value in batch.column(0).to_pylist():
                    yield "" if value is None else value
    except pyarrow.ArrowException as error:
        raise DataError(f"{piece.path}: damaged Parquet file: {error}") from None


def _read_hub(piece: Piece, key: str) -> Iterator[str]:
    assert piece.hub is not None
    for row in hub_rows(piece.path, *piece.hub, piece.start, key):
        yield _value(row, key, f"hub:{piece.path}")


def _value(row: dict, key: str, place: str) -> str:
    _check_key(row, key, place)
    return "" if row[key] is None else row[key]


def _check_key(keys: Collection[str], key: str, place: str) -> None:
    if key not in keys:
        raise DataError(f"{place} has no {key!r} (it has: {', '.join(keys) or 'nothing'}); name the text with --text-key")


def _without_surrogates(text: str) -> str:
    """JSON may hold halves of surrogate pairs, which are not characters: pairs are joined, lone halves become U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


READERS: dict[str, Callable[[Piece, str], Iterator[str]]] = {
    "text": _read_text,
    "large text": _read_large_text,
    "topics": _read_topics,
    "jsonl": _read_json_lines,
    "jsonl.gz": _read_json_lines_gzip,
    "parquet": _read_parquet,
    "hub": _read_hub,
}
