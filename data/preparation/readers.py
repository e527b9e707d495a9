"""Reads the documents (str) in the pieces of a source, one at a time: memory is bounded by one document.

- text: a file of at most LARGE_TEXT bytes is one document.
- large text: document k begins after the first blank line at or after byte k * WINDOW. If the next WINDOW bytes contain no blank
  line, it begins after their first line end, else after their first white space, else at the next whole character. So a
  document has at most 2 * WINDOW bytes, the documents together are the file, and each is found without reading the file from
  its start.
- JSON lines, Parquet and hub data sets: the string under the text key of a row; null is an empty document. A compressed file
  cannot be read from its middle, so it is never divided: many files are read in parallel, a single file is not.
Text is not changed: line ends and NUL stay. Only a byte order mark at the beginning of a file is dropped. Documents that are
empty or only white space are skipped and counted.
"""

import codecs
import gzip
import io
import json
import re
import shlex
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data import DataError, first_line
from data.preparation.hub import hub_rows
from data.preparation.sources import WINDOW, Piece, Unit
from data.preparation.stdlib import stdlib_topics

SAMPLE_CHARACTERS = 32 * 2**20  # length of the text on which a tokenizer is trained
SAMPLE_UNITS = 32  # the most units from which this text is taken
MARK = "\ufeff"  # the byte order mark
CONTINUATION = bytes(range(0x80, 0xC0))  # all bytes that can follow the first byte of a UTF-8 character
BLANK_LINE = re.compile(rb"\n\s*\n")


def documents(unit: Unit, text_key: str = "text") -> Iterator[str]:
    """Yield the documents of one unit, in order. Raises DataError with the file and the place of an error in it."""
    return filter(None, texts(unit, text_key))


def texts(unit: Unit, text_key: str = "text") -> Iterator[str]:
    """Yield the same, and '' for each document that is empty or only white space, so that these can be counted."""
    for piece in unit:
        try:
            for text in READERS[piece.kind](piece, text_key):
                yield "" if text.isspace() else _without_surrogates(text)
        except OSError as error:
            raise DataError(f"{piece.path}: {error.strerror or error}") from None


def sample(units: list[Unit], text_key: str = "text", limit: int = SAMPLE_CHARACTERS) -> Iterator[str]:
    """Yield at most `limit` characters of documents: the beginnings, of equal length, of SAMPLE_UNITS evenly spread units."""
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
    """Return where the document of the window at `position` begins, at most WINDOW bytes after `position`."""
    if position == 0:
        return 0
    file.seek(position)
    window = file.read(WINDOW)
    if match := BLANK_LINE.search(window) or re.search(rb"\n", window) or re.search(rb"\s", window):
        return position + match.end()
    rest = window[:3]  # a character that began before the window ends within these bytes
    return position + len(rest) - len(rest.lstrip(CONTINUATION))


def _decode(data: bytes, path: str, offset: int) -> str:
    """Decode UTF-8 text from byte `offset` of a file, without a byte order mark at the beginning of the file."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise DataError(f"{path}: not UTF-8 text at byte {at}; convert it, or leave it out with a glob") from None
    return text if offset else text.removeprefix(MARK)


def _read_topics(piece: Piece, _: str) -> Iterator[str]:
    yield from stdlib_topics()


class BadRecord(Exception):
    """A record (line or row) is wrong. The message follows the name of the record. `byte`: the position in it, if known."""

    def __init__(self, problem: str, byte: int | None = None):
        super().__init__(problem)
        self.byte = byte


def _read_json_lines(piece: Piece, key: str) -> Iterator[str]:
    """Yield the texts of the lines that begin within [start, stop)."""
    with open(piece.path, "rb") as file:
        position = max(piece.start - 1, 0)
        file.seek(position)
        if piece.start:
            position += len(file.readline())
        while position < piece.stop and (line := file.readline()):
            try:
                text = _json_text(line, key, first=position == 0)
            except BadRecord as error:
                where = f"line {_line_number(piece.path, position)}"
                where += "" if error.byte is None else f" (byte {position + error.byte} of the file)"
                raise DataError(f"{piece.path}: {where} {error}{_advice(piece, position == 0)}") from None
            if text is not None:
                yield text
            position += len(line)


def _advice(piece: Piece, first: bool) -> str:
    """Return advice for a .json file whose first line is not a record, since the file may not be meant as JSON lines."""
    name = Path(piece.path).name.lower().removesuffix(".gz").removesuffix(".zst")
    if not first or not name.endswith(".json"):
        return ""
    return "; a .json file is read as JSON lines, a record on each: a glob such as 'FOLDER/**/*.py' leaves it out"


def _line_number(path: str, position: int) -> int:
    """Return the number, from 1, of the line that begins at byte `position` of a file."""
    count = 1
    with open(path, "rb") as file:
        while position > 0 and (data := file.read(min(position, 2**20))):
            count += data.count(b"\n")
            position -= len(data)
    return count


def _read_compressed_json_lines(piece: Piece, key: str) -> Iterator[str]:
    try:
        with _decompressed(piece.path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = _json_text(line, key, first=number == 1)
                except BadRecord as error:
                    raise DataError(f"{piece.path}: line {number} {error}{_advice(piece, number == 1)}") from None
                if text is not None:
                    yield text
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        kind = "gzip" if piece.path.lower().endswith(".gz") else "zstd"
        if kind == "zstd" and "too much memory" in str(error):  # libzstd's words
            raise DataError(
                f"{piece.path}: its zstd window is above 128 MiB (zstd --long), which is not read; compress it again: "
                f"zstd -dc --long=31 {shlex.quote(piece.path)} | zstd -o NEW.jsonl.zst"
            ) from None
        raise DataError(f"{piece.path}: damaged {kind} file: {first_line(error)}") from None


def _decompressed(path: str) -> BinaryIO | io.BufferedIOBase:
    if path.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path}: reading zstd needs the package pyarrow: pip install pyarrow") from None
    return io.BufferedReader(pyarrow.input_stream(open(path, "rb"), compression="zstd"))


def _json_text(line: bytes, key: str, first: bool) -> str | None:
    """Return the text of one line; None if the line is empty. `first`: whether it is the first line of the file."""
    if line.isspace():
        return None
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode() if first else line.decode())
    except UnicodeDecodeError as error:
        raise BadRecord("is not UTF-8 text", error.start) from None
    except json.JSONDecodeError as error:
        raise BadRecord(f"is not a JSON line: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:
        raise BadRecord(f"is not a JSON line: {first_line(error)}") from None
    except RecursionError:
        raise BadRecord("is nested too deeply for a JSON line") from None
    if not isinstance(row, dict):
        raise BadRecord(f"holds {type(row).__name__}, not a JSON object with the key {key!r}")
    if line.count(json.dumps(key, ensure_ascii=False).encode()) > 1:  # the key may be there twice, or occur in a text
        pairs = json.loads(line.removeprefix(codecs.BOM_UTF8), object_pairs_hook=list)
        if sum(name == key for name, _ in pairs) > 1:
            raise BadRecord(f"has {key!r} more than once")
    return _value(row, key)


def _read_parquet(piece: Piece, key: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with open(piece.path, "rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
            try:
                _check_key(file.schema_arrow.names, key)
            except BadRecord as error:
                raise DataError(f"{piece.path} {error}") from None
            row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
            groups = range(piece.start, piece.stop)
            for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[key], use_threads=False):
                for value in _python_values(batch.column(0)):
                    row += 1
                    try:
                        yield _text(value, key)
                    except BadRecord as error:
                        raise DataError(f"{piece.path}: row {row} {error}") from None
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{piece.path}: damaged Parquet file: {first_line(error)}") from None


def _python_values(column: Any) -> Iterator[Any]:
    """Yield the values of an Arrow column; for text that is not UTF-8, yield the UnicodeDecodeError."""
    try:
        yield from column.to_pylist()
    except UnicodeDecodeError:
        for value in column:
            try:
                yield value.as_py()
            except UnicodeDecodeError as error:
                yield error


def _read_hub(piece: Piece, key: str) -> Iterator[str]:
    assert piece.hub is not None
    for number, row in enumerate(hub_rows(piece.path, *piece.hub, piece.start, key), start=1):
        try:
            yield _value(row, key)
        except BadRecord as error:
            raise DataError(f"hub:{piece.path}: row {number} of part {piece.start + 1} {error}") from None


def _value(row: dict, key: str) -> str:
    _check_key(row, key)
    return _text(row[key], key)


def _check_key(keys: Collection[str], key: str) -> None:
    if key not in keys:
        raise BadRecord(f"has no {key!r} (it has: {', '.join(keys) or 'nothing'}); name the text with --text-key")


def _text(value: Any, key: str) -> str:
    """Return the text of a record; null is an empty document."""
    if value is None:
        return ""
    if isinstance(value, UnicodeDecodeError):
        raise BadRecord("is not UTF-8 text")
    if not isinstance(value, str):
        raise BadRecord(f"has {type(value).__name__}, not text, under {key!r}")
    return value


def _without_surrogates(text: str) -> str:
    """Join surrogate pairs, which JSON may contain, into characters, and replace lone surrogates by U+FFFD."""
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
    "compressed jsonl": _read_compressed_json_lines,
    "parquet": _read_parquet,
    "hub": _read_hub,
}
