"""Lists the files of a path or a glob, their types, and the skipped files with the reason: no file is skipped silently."""

import codecs
import errno
import glob
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data import DataError

JSON_LINES = (".jsonl", ".ndjson", ".json")
COMPRESSION = (".gz", ".zst")
COMPRESSED_JSON_LINES = tuple(name + packed for name in JSON_LINES for packed in COMPRESSION)
PARQUET = ".parquet"
# Suffixes of files that are not text, or not readable as text directly. Other binary files are recognized by NUL bytes.
PACKED = (*COMPRESSION, ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar")
NOT_TEXT = (
    *(".csv", ".tsv", ".xls", ".xlsx", ".ods", ".arrow", ".feather", ".avro", ".orc", ".sqlite", ".db", ".npy", ".npz"),
    *(".pdf", ".doc", ".docx", ".odt", ".rtf", ".ppt", ".pptx", ".epub", ".mobi", ".djvu"),
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".tif", ".tiff", ".mp3", ".wav", ".mp4"),
    *(".pkl", ".pickle", ".pt", ".pth", ".safetensors", ".bin", ".pyc", ".so", ".exe"),
)
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32-LE begins with the first of them
HEAD = 8192  # bytes at the start of a file that are checked to distinguish text from binary data
EXAMPLES = 3


@dataclass
class Listing:
    """The names below `base` of the files to read, sorted; and the names of skipped files, by reason."""

    base: Path
    names: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """Return a line on the types of the files to read, and a line on skipped files, if there are any."""
        kinds = Counter(_suffix(name) for name in self.names)
        lines = ["files: " + ", ".join(f"{count} {kind or 'without a suffix'}" for kind, count in sorted(kinds.items()))]
        if plain := sorted(kind for kind in kinds if kind not in (".txt", PARQUET, *JSON_LINES, *COMPRESSED_JSON_LINES)):
            lines[0] += f" (read as plain text: {', '.join(kind or 'those without a suffix' for kind in plain)})"
        return [*lines, f"left out: {self.left_out_line()}"] if self.left_out else lines

    def left_out_line(self) -> str:
        """Return each reason for skipping with its count and some names."""
        parts = []
        for reason, names in sorted(self.left_out.items()):
            more = ", ..." if len(names) > EXAMPLES else ""
            parts.append(f"{len(names)} {reason} ({', '.join(names[:EXAMPLES])}{more})")
        return "; ".join(parts)


def local_files(name: str) -> Listing:
    """List the files of a path or glob. Linked folders are followed. A file or folder that is reached twice is read once.

    Raises DataError if there is nothing, or no file that can be read.
    """
    path = Path(name)
    left_out: dict[str, list[Path]] = defaultdict(list)
    if path.is_dir():
        found = [file for _, file in sorted(_walk(path, left_out), key=lambda pair: (pair[0], pair[1].as_posix()))]
    elif os.path.lexists(path):
        if reason := _why_not(path):
            raise DataError(f"source {name}: {_refusal(reason)}")
        found = [path]
    else:
        matches = sorted(map(Path, glob.glob(name, recursive=True)))
        if not matches and not glob.has_magic(name):
            raise DataError(f"source {name}: no such file or folder, nor hub:NAME or stdlib")
        found = [match for match in matches if not os.path.isdir(match)]
        found.sort(key=Path.is_symlink)
        if "**" not in name:
            left_out["folders: a glob takes files, ** those below too"] = [match for match in matches if os.path.isdir(match)]
    read, seen = [], set()
    for file in found:
        if reason := _why_not(file):
            left_out[reason].append(file)
        elif (identity := _identity(file)) in seen:
            left_out["further links to a file that is read"].append(file)
        else:
            seen.add(identity)
            read.append(file)
    base = path if path.is_dir() else Path(os.path.commonpath([file.parent for file in read or [path]]))
    said = {
        reason: sorted(Path(os.path.relpath(file, base)).as_posix() for file in files)
        for reason, files in left_out.items()
        if files
    }
    listing = Listing(base, sorted(file.relative_to(base).as_posix() for file in read), said)
    if not read:
        left = f" that can be read; left out: {listing.left_out_line()}" if said else ""
        if any(file.suffix == ".bin" for files in left_out.values() for file in files):
            left += "; files of tokens are for python -m data.adopt"
        raise DataError(f"source {name}: it holds no file{left}")
    return listing


def _walk(base: Path, left_out: dict[str, list[Path]]) -> Iterator[tuple[bool, Path]]:
    """Yield (reached by a link, file) for every file below `base` that is not hidden. Linked folders come last, each once."""

    def unreadable(error: OSError) -> None:
        left_out["unreadable"].append(Path(error.filename))

    waiting, seen = [base], set()
    while waiting:
        root = waiting.pop(0)
        for parent, folders, files in os.walk(root, onerror=unreadable):
            inside = Path(parent)
            if (identity := _identity(inside)) in seen:
                left_out["further links to a folder that is read"].append(inside)
                folders.clear()
                continue
            seen.add(identity)
            left_out["hidden"] += [inside / name for name in (*folders, *files) if name.startswith(".")]
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting += [inside / name for name in folders if (inside / name).is_symlink()]
            for name in files:
                if not name.startswith("."):
                    yield root != base or (inside / name).is_symlink(), inside / name


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _why_not(path: Path) -> str:
    """Return the reason why a file is skipped, '' if it is read.

    Raises DataError for text in UTF-16, which the user probably wants to be read.
    """
    suffix = _suffix(path.name)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "not a regular file"
        if suffix in (*NOT_TEXT, *PACKED):
            return suffix
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        return "broken link" if path.is_symlink() and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP) else "unreadable"
    if suffix in (PARQUET, *COMPRESSED_JSON_LINES):
        return ""
    if head.startswith(UTF16) or (suffix in (".txt", *JSON_LINES) and head.count(0) * 4 > len(head)):
        raise DataError(f"{path}: UTF-16 or UTF-32 instead of UTF-8 text; convert it: iconv -f UTF-16 -t UTF-8")
    return "binary" if suffix not in (".txt", *JSON_LINES) and 0 in head else ""


def _suffix(name: str) -> str:
    """Return the suffix of a file's name in lower case; for compressed JSON lines, both parts of it."""
    name = name.lower()
    return next((s for s in COMPRESSED_JSON_LINES if name.endswith(s)), Path(name).suffix)


def _refusal(reason: str) -> str:
    """Return the message for a source whose only file is skipped."""
    if reason in PACKED:
        return f"of compressed files only {', '.join(COMPRESSED_JSON_LINES)} are read; unpack it"
    if reason in NOT_TEXT:
        return f"{reason} is not read; convert it to text, JSON lines or Parquet"
    return {"unreadable": "it cannot be read: see its permissions", "binary": "binary, not UTF-8 text"}.get(reason, reason)
