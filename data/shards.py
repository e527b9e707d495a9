"""Reads a prepared folder: the tokens of a split, after checks whose errors name the wrong file.

index.json: {format, version, dtype, vocab_size, end_of_text_id, tokenizer_sha256, splits: {train, val: {tokens,
documents, bytes, shards: [{name, tokens, sha256, documents, docs_sha256}]}}, arguments, inventory, val_inventory, notes}.
Folders of earlier versions lack `bytes` (of UTF-8 text), `val_inventory`, `notes` and `sources`. Only data.prepare writes
`sources`: for SOURCE and --val-source {written_sha256 (names, sizes and modification times), texts_sha256 (texts of documents)}.

The format "token-files" (data.adopt) has the same index, but its shards are files of other projects, which stay where they are.
`files` is their folder, absolute or relative to this one. A shard's `name` is a path in that folder, its tokens begin at the byte
`offset`, and it was modified at `mtime_ns`. It has no file of documents.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data import DataError
from data.files import read_json
from data.shard_files import ShardFile, ShardFiles
from data.token_files import holds_tokens
from data.tokenizer import json_hash

FORMAT = "token-shards"
FILES_FORMAT = "token-files"
VERSION = 1  # of both formats
VERIFY_BYTES = 10**9  # a split of at most this size is hashed every time it is opened, which takes a second or two
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class EmptySplit(DataError):
    """A split has no token. `found`: the message without the remedy."""

    def __init__(self, folder: Path, split: str):
        self.found = f"{folder}: the split {split!r} is empty"
        super().__init__(f"{self.found}; prepare it with --val-source or --val-fraction above 0")


class TokenShards:
    """The tokens of one split, as one long array on disk.

    Opening checks the index, the tokenizer's hash, and the size of every file. It also checks the sha256 of every file if the
    split has at most VERIFY_BYTES; of a larger split, only that of data.adopt's files that were modified since. `python -m
    data.verify FOLDER` checks everything, for any size. A file that changes later is noticed when it is read. All errors are
    DataError and name the file; EmptySplit is the DataError for a split without a token.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        index = read_index(self.folder)
        if split not in index["splits"]:
            raise DataError(f"{self.folder}: no split {split!r}, but {', '.join(index['splits'])}")
        check_files(self.folder, index, split)
        self.shards = index["splits"][split]["shards"]
        self.n_tokens: int = index["splits"][split]["tokens"]
        self.n_bytes: int | None = index["splits"][split].get("bytes")  # of UTF-8 text; None if unknown
        self.vocab_size: int = index["vocab_size"]
        self.eot_id: int = index["end_of_text_id"]
        self.tokenizer_hash: str = index["tokenizer_sha256"]
        self.fingerprint: str = fingerprint(index)
        if not self.n_tokens:
            raise EmptySplit(self.folder, split)
        self.dtype = DTYPES[index["dtype"]]
        files = list(files_of(self.folder, index, split))
        self._files = ShardFiles(files[:: len(files) // len(self.shards)])  # without the files of documents
        self._offsets = [0 if index["format"] == FORMAT else shard["offset"] for shard in self.shards]
        small = self.n_tokens * self.dtype.itemsize <= VERIFY_BYTES
        for i, file in enumerate(files):
            written = None if index["format"] == FORMAT else self.shards[i]["mtime_ns"]
            if small or written not in (None, os.stat(file.path).st_mtime_ns):
                check_hash(file)
        self._starts = np.cumsum([0] + [shard["tokens"] for shard in self.shards])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens [start, stop) of the split, (stop - start,) in the shards' dtype. They may extend over shards.

        Raises:
            DataError: a shard does not match the index any more.
        """
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a split of {self.n_tokens}")
        first = int(np.searchsorted(self._starts, start, "right")) - 1
        parts = []
        while start < stop:
            base, end = int(self._starts[first]), min(stop, int(self._starts[first + 1]))
            offset, size = self._offsets[first] + (start - base) * self.dtype.itemsize, (end - start) * self.dtype.itemsize
            parts.append(self._files.read(first, offset, size))
            start = end
            first += 1
        return np.frombuffer(b"".join(parts), self.dtype)

    def locate(self, position: int) -> tuple[Path, int]:
        """Return the shard file that holds the token at `position`, and the token's offset in it."""
        i = int(np.searchsorted(self._starts, position, "right")) - 1
        return self._files.files[i].path, position - int(self._starts[i])


def read_index(folder: Path) -> dict:
    """Return the checked index.json of a prepared folder. Raises DataError if it is missing, damaged or of another version."""
    path = folder / "index.json"
    advice = f"prepare it first: python -m data.prepare SOURCE {folder}"
    if folder.is_file():
        name = f": {folder.parent}" if folder.name == path.name else ""
        raise DataError(f"{folder}: a file, not a prepared folder; name the folder{name}")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {advice}")
    if not path.exists():
        started = (folder / ".partial").exists()
        if holds_tokens(folder):
            advice = f"to use its tokens: python -m data.adopt {folder} FOLDER --tokenizer NAME"
        state = "its preparation is not finished; run the same command again" if started else advice
        raise DataError(f"{folder}: no index.json; {state}")
    try:
        index = read_json(path)
        known = index["format"] in (FORMAT, FILES_FORMAT)
        version = index["version"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not an index of token shards") from None
    if not known or version != VERSION:
        raise DataError(f"{path}: format {index['format']} version {version}; this code reads {FORMAT} version {VERSION}")
    try:
        fingerprint(index)
        numbers, hashes = [index["vocab_size"], index["end_of_text_id"]], [index["tokenizer_sha256"]]
        for split, content in index["splits"].items():
            hashes.extend(file.sha256 for file in files_of(folder, index, split))
            numbers.extend((content["tokens"], content["documents"]))
            numbers.extend(shard["mtime_ns"] for shard in content["shards"] if index["format"] == FILES_FORMAT)
            if content["tokens"] != sum(shard["tokens"] for shard in content["shards"]):
                raise DataError(f"{path}: damaged, the shards of {split} do not have the tokens that it says")
        hashes.extend(kept[key] for kept in index.get("sources", []) for key in ("written_sha256", "texts_sha256"))
        whole = all(type(number) is int for number in numbers) and all(isinstance(found, str) for found in hashes)
        whole = whole and index["vocab_size"] > 0 and index["end_of_text_id"] >= 0
        whole = whole and isinstance(index["arguments"], dict) and isinstance(index.get("notes", []), list)
        whole = whole and isinstance(index.get("sources", []), list)
    except (LookupError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise DataError(f"{path}: damaged, it is not what data.prepare writes")
    return index


def is_prepared(folder: Path) -> bool:
    """Return whether a folder contains an index.json of tokens. The index is not checked."""
    try:
        return read_json(folder / "index.json")["format"] in (FORMAT, FILES_FORMAT)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def check_files(folder: Path, index: dict, *splits: str) -> None:
    """Raise DataError unless tokenizer.json is the one of these shards, and every file of the splits exists with its size."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise DataError(f"{path}: missing")
    try:
        found = json_hash(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise DataError(f"{path}: damaged, not JSON") from None
    if found != index["tokenizer_sha256"]:
        raise DataError(f"{path}: not the tokenizer of these shards (sha256 {found[:12]}, not {index['tokenizer_sha256'][:12]})")
    for split in splits:
        for path, size, _ in files_of(folder, index, split):
            if not path.is_file():
                own = index["format"] == FORMAT
                advice = "prepare the corpus into a new folder" if own else "run data.adopt again if it moved"
                raise DataError(f"{path}: missing; restore it, or {advice}")
            if path.stat().st_size != size:
                raise DataError(f"{path}: damaged, {path.stat().st_size:,} bytes instead of {size:,}")


def verify_shards(folder: Path, index: dict, split: str) -> Iterator[tuple[str, int]]:
    """Hash every file of a split. Yields (name, bytes) of each undamaged file, and raises DataError at the first damaged one."""
    for file in files_of(folder, index, split):
        check_hash(file)
        yield file.path.name, file.size


def check_hash(file: ShardFile) -> None:
    """Raise DataError unless the file's content matches the index."""
    with open(file.path, "rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != file.sha256:
        raise DataError(f"{file.path}: damaged, its sha256 is {found[:12]}... instead of {file.sha256[:12]}...")


def fingerprint(index: dict) -> str:
    """Return the sha256 of the tokens, their division into shards and splits, and the tokenizer; independent of the machine."""
    parts = {split: [(s["tokens"], s["sha256"]) for s in index["splits"][split]["shards"]] for split in index["splits"]}
    keys = ("format", "version", "dtype", "vocab_size", "end_of_text_id", "tokenizer_sha256")
    return json_hash(json.dumps([{key: index[key] for key in keys}, parts]))


def docs_path(shard: Path) -> Path:
    """Return the file beside a shard that holds the starts of its documents."""
    return shard.with_suffix(".docs.bin")


def files_of(folder: Path, index: dict, split: str) -> Iterator[ShardFile]:
    own = index["format"] == FORMAT
    for shard in index["splits"][split]["shards"]:
        name, tokens, documents, offset = shard["name"], shard["tokens"], shard["documents"], 0 if own else shard["offset"]
        inside = Path(name).name == name if own else not Path(name).is_absolute() and ".." not in Path(name).parts
        if not inside or not all(isinstance(number, int) and number >= 0 for number in (tokens, documents, offset)):
            raise DataError(f"{folder / 'index.json'}: damaged, a shard is named {name!r} and has {tokens!r} tokens")
        path = folder / name if own else folder / index["files"] / name
        yield ShardFile(path, offset + tokens * DTYPES[index["dtype"]].itemsize, shard["sha256"])
        if own:
            yield ShardFile(docs_path(path), documents * 8, shard["docs_sha256"])
