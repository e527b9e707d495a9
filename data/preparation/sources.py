"""Opens a source of text and cuts it into units. Units do not depend on the number of workers, and are small enough to repeat.

A source is named by one string:
    PATH        a file, a folder (every file below it that is not hidden, also in linked folders), or a glob ('corpus/**/*.md')
    hub:NAME    a data set of the Hugging Face hub, streamed; hub:NAME@REVISION takes that revision
    stdlib      the Python standard library's own sources and documentation topics, which need no download
A file's name determines its type: .jsonl, .ndjson, .json (JSON lines) and the same with .gz or .zst; .parquet; any other
file is UTF-8 text, except the types that data/preparation/listing.py skips. data/preparation/readers.py says how documents
are read from each type.
"""

import hashlib
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data import DataError, first_line
from data.preparation.hub import hub_revision, load_hub
from data.preparation.listing import COMPRESSED_JSON_LINES, JSON_LINES, PARQUET, Listing, local_files
from data.preparation.stdlib import stdlib_files

UNIT_BYTES = 16 * 2**20  # text in one unit, which takes seconds to tokenize
WINDOW = 16 * 2**10  # bytes of a large text file for each document
LARGE_TEXT = 256 * 2**10  # bytes; a text file above this is split into documents
COMPRESSION_FACTOR = 4  # bytes of English text for each byte compressed, roughly
TOPICS_BYTES = 500_000  # pydoc_data.topics, roughly


@dataclass(frozen=True)
class Piece:
    """The input of one call of a reader. `start` and `stop` count bytes, row groups or parts of a hub data set, by `kind`."""

    kind: str  # a key of readers.READERS
    path: str
    start: int
    stop: int
    size: int  # bytes of text, estimated; 0 if unknown
    hub: tuple[str | None, str, str, int] | None = None  # configuration, split, revision, number of parts


Unit = tuple[Piece, ...]


@dataclass(frozen=True)
class Source:
    """An opened source: its units in the order of their documents, and values that identify its state."""

    units: list[Unit]
    inventory: dict[str, str | int]  # independent of the place of the files and of the time when they were written
    written: str  # sha256 over names, sizes and modification times; '' for the hub
    state: str  # sha256 over the same and the units
    notes: list[str] = field(default_factory=list)  # lines for the user on file types, skipped files and cut files


def open_source(name: str, hub_config: str | None = None, hub_split: str = "train") -> Source:
    """List a source's units. Reads no text, only the metadata of Parquet files and hub data sets.

    Raises DataError if the source does not exist, holds no file, or has a file or hub data set that cannot be read.
    """
    if name.startswith("hub:"):
        return _open_hub(name.removeprefix("hub:"), hub_config, hub_split)
    listing = Listing(*stdlib_files()) if name == "stdlib" else local_files(name)
    base, files = listing.base, listing.names
    stats = [(base / file).stat() for file in files]
    sizes = [(file, stat.st_size) for file, stat in zip(files, stats, strict=True)]
    inventory: dict[str, str | int] = {
        "files": len(files),
        "bytes": sum(size for _, size in sizes),
        "names_sha256": _digest(sizes),
    }
    pieces: list[Piece] = []
    if name == "stdlib":
        pieces += [Piece("text", str(base / file), 0, size, size) for file, size in sizes]
        pieces.append(Piece("topics", "", 0, 1, TOPICS_BYTES))
        inventory["python"] = platform.python_version()
        notes = []
    else:
        for file, size in sizes:
            pieces += _file_pieces(base / file, size)
        notes = [*listing.notes(), *_cut_notes(pieces)]
    units = _group(pieces)
    times = [stat.st_mtime_ns for stat in stats]
    return Source(units, inventory, _digest([sizes, times]), _digest([sizes, times, units]), notes)


def total_bytes(units: Iterable[Unit]) -> int:
    """Return the estimated bytes of text in these units."""
    return sum(piece.size for unit in units for piece in unit)


def _cut_notes(pieces: list[Piece]) -> list[str]:
    """Return a note that large text files are cut into documents, if there are any."""
    large = sorted({piece.path for piece in pieces if piece.kind == "large text"})
    if not large:
        return []
    documents = sum(-(-piece.size // WINDOW) for piece in pieces if piece.kind == "large text")
    names = Path(large[0]).name + (", ..." if large[1:] else "")
    return [
        f"{len(large)} text file(s) above {LARGE_TEXT // 1024} KiB ({names}) are cut into {documents:,} documents, each with "
        f"an end of text: at the first blank line after every {WINDOW // 1024} KiB"
    ]


def _file_pieces(path: Path, size: int) -> list[Piece]:
    name = path.name.lower()
    if name.endswith(PARQUET):
        return _parquet_pieces(path)
    if name.endswith(COMPRESSED_JSON_LINES):
        return [Piece("compressed jsonl", str(path), 0, size, size * COMPRESSION_FACTOR)]
    if name.endswith(JSON_LINES):
        kind = "jsonl"
    elif size > LARGE_TEXT:
        kind = "large text"
    else:
        return [Piece("text", str(path), 0, size, size)]
    # A multiple of WINDOW, so that documents do not depend on the size of a unit.
    step = max(WINDOW, UNIT_BYTES // WINDOW * WINDOW)
    cuts = [(start, min(start + step, size)) for start in range(0, size, step)]
    return [Piece(kind, str(path), start, stop, stop - start) for start, stop in cuts]


def _parquet_pieces(path: Path) -> list[Piece]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs the package pyarrow: pip install pyarrow") from None
    try:
        with open(path, "rb") as file:  # pyarrow cannot open a name that is not UTF-8
            metadata = pyarrow.parquet.read_metadata(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file: {first_line(error)}") from None
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    return [Piece("parquet", str(path), i, i + 1, size) for i, size in enumerate(sizes)]


def _open_hub(name: str, config: str | None, split: str) -> Source:
    name, _, revision = name.partition("@")
    revision = hub_revision(name, revision or None)
    parts = load_hub(name, config, split, revision).num_shards
    units: list[Unit] = [(Piece("hub", name, i, i + 1, 0, (config, split, revision, parts)),) for i in range(parts)]
    return Source(units, {"revision": revision, "shards": parts}, "", _digest(units))


def _group(pieces: list[Piece]) -> list[Unit]:
    """Join consecutive pieces until they hold UNIT_BYTES: many small files make one unit."""
    units: list[Unit] = []
    unit: list[Piece] = []
    held = 0
    for piece in pieces:
        unit.append(piece)
        held += piece.size
        if held >= UNIT_BYTES:
            units.append(tuple(unit))
            unit, held = [], 0
    return [*units, tuple(unit)] if unit else units


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogateescape")).hexdigest()
