"""Reads a prepared folder: the tokens of a split, after checks that name the file that is wrong.

index.json: {format, version, dtype, vocab_size, end_of_text_id, tokenizer_sha256, splits: {train, val: {tokens,
documents, bytes, shards: [{name, tokens, sha256, documents, docs_sha256}]}}, arguments, inventory, val_inventory, notes}.
`bytes` (of UTF-8 text), `val_inventory`, `notes` and `sources` are not in folders of former versions. `sources`, of data.prepare
alone: for SOURCE and --val-source {written_sha256 (names, sizes and times of change), texts_sha256 (the texts of documents)}.

The format "token-files" (data.adopt) is the same over files of others, which stay where they are: `files` is their folder,
absolute or relative to this one; a shard's `name` is a path in it, its tokens begin at the byte `offset`, it was written at
`mtime_ns`, and it has no file of documents.
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
VERSION = 1  # of both
VERIFY_BYTES = 10**9  # a split of at most this size is hashed whenever it is opened, which takes a second or two
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class EmptySplit(DataError):
    """A split without a token. `found`: what its message says before the remedy."""

    def __init__(self, folder: Path, split: str):
        self.found = f"{folder}: the split {split!r} is empty"
        super().__init__(f"{self.found}; prepare it with --val-source or --val-fraction above 0")


class TokenShards:
    """The tokens of one split, as one long array on disk.

    Opening checks the index, the tokenizer's hash, the size of every file, and the sha256 of every file if the split has at most
    VERIFY_BYTES; of a larger one, the sha256 of files of others (data.adopt) that were written to since. `python -m data.verify
    FOLDER` checks everything, whatever its size. A file that changes after that is noticed when it is read. DataError names the
    file; EmptySplit, one of them, is for a split without a token.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        index = read_index(self.folder)
        if split not in index["splits"]:
            raise DataError(f"{self.folder}: no split {split!r}, but {', '.join(index['splits'])}")
        check_files(self.folder, index, split)
        self.shards = index["splits"][split]["shards"]
        self.n_tokens: int = index["splits"][split]["tokens"]
        self.n_bytes: int | None = index["splits"][split].get("bytes")  # of UTF-8 text; None in folders of former versions
        self.vocab_size: int = index["vocab_size"]
        self.eot_id: int = index["end_of_text_id"]
        self.tokenizer_hash: str = index["tokenizer_sha256"]
        self.fingerprint: str = fingerprint(index)
        if not self.n_tokens:
            raise EmptySplit(self.folder, split)
        self.dtype = DTYPES[index["dtype"]]
        files = list(files_of(self.folder, index, split))
        self._files = ShardFiles(files[:: len(files) // len(self.shards)])  # without those of documents
        self._offsets = [0 if index["format"] == FORMAT else shard["offset"] for shard in self.shards]
        small = self.n_tokens * self.dtype.itemsize <= VERIFY_BYTES
        for i, file in enumerate(files):
            written = None if index["format"] == FORMAT else self.shards[i]["mtime_ns"]
            if small or written not in (None, os.stat(file.path).st_mtime_ns):
                check_hash(file)
        self._starts = np.cumsum([0] + [shard["tokens"] for shard in self.shards])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the split as an array (stop - start,) of the shards' dtype, across shards.

        Raises:
            DataError: a shard is no longer the one that the index describes.
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
        """The shard file that holds the token at `position`, and the token's offset in it."""
        i = int(np.searchsorted(self._starts, position, "right")) - 1
        return self._files.files[i].path, position - int(self._starts[i])


def read_index(folder: Path) -> dict:
    """index.json of a prepared folder, of a version that this code knows."""
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
    """Whether an index.json of tokens lies in a folder, whatever its state."""
    try:
        return read_json(folder / "index.json")["format"] in (FORMAT, FILES_FORMAT)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def check_files(folder: Path, index: dict, *splits: str) -> None:
    """tokenizer.json is the one of these shards, and every file of the splits is there, as long as the index says."""
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
    """Hash every file of a split; yields (name, bytes) of each that is undamaged."""
    for file in files_of(folder, index, split):
        check_hash(file)
        yield file.path.name, file.size


def check_hash(file: ShardFile) -> None:
    """DataError unless the file holds what the index describes."""
    with open(file.path, "rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != file.sha256:
        raise DataError(f"{file.path}: damaged, its sha256 is {found[:12]}... instead of {file.sha256[:12]}...")


def fingerprint(index: dict) -> str:
    """sha256 of the tokens, their division into splits and the tokenizer; the same wherever they were prepared."""
    parts = {split: [(s["tokens"], s["sha256"]) for s in index["splits"][split]["shards"]] for split in index["splits"]}
    keys = ("format", "version", "dtype", "vocab_size", "end_of_text_id", "tokenizer_sha256")
    return json_hash(json.dumps([{key: index[key] for key in keys}, parts]))


def docs_path(shard: Path) -> Path:
    """The file beside a shard with the starts of its documents."""
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
