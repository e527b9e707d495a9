"""Encoded units into the shards of the training and the validation split, in the order of the source.

NAME.bin holds token ids without a header; NAME.docs.bin the place in NAME.bin, uint64, of every document that begins
there (a document may run on into the next shard). Everything is little-endian.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data.preparation.encode import DOCUMENT

BLOCK = 2**22  # tokens held in memory at once


def hash_limit(hashes: Iterable[np.ndarray], fraction: float) -> int:
    """Documents whose 64-bit hash is below the limit are validation: about `fraction` of them, equal texts together.

    If that leaves a split empty, the smallest hash goes to validation, or the largest to training, provided that
    there are two different documents and fraction > 0; a single document is for training.
    """
    limit = int(fraction * 2**64)
    count, below, smallest, largest = 0, 0, 2**64, -1
    for part in hashes:
        if len(part):
            count += len(part)
            below += int((part < np.uint64(limit)).sum())
            smallest, largest = min(smallest, int(part.min())), max(largest, int(part.max()))
    if below == count:
        return max(largest, 0)
    if below == 0 and limit and smallest < largest:
        return smallest + 1
    return limit


def assemble(units: list[Path], folder: Path, dtype: np.dtype, fraction: float, shard_tokens: int) -> dict[str, dict]:
    """Write the shards of both splits into `folder`; returns what index.json says of them."""
    limit = np.uint64(hash_limit((_documents(unit)["hash"] for unit in units), fraction))
    writers = {split: ShardWriter(folder, split, dtype, shard_tokens) for split in ("train", "val")}
    for unit in units:
        documents = _documents(unit)
        with open(unit.with_suffix(".tokens"), "rb") as file:
            total = os.fstat(file.fileno()).st_size // dtype.itemsize
            for first, last, validation in _runs(documents["hash"] < limit):
                stop = int(documents["start"][last]) if last < len(documents) else total
                writer = writers["val" if validation else "train"]
                writer.begin_documents(documents["start"][first:last])
                for size in _blocks(stop - int(documents["start"][first])):
                    writer.write(np.fromfile(file, dtype, size))
    return {split: writer.close() for split, writer in writers.items()}


class ShardWriter:
    """Cuts one split's tokens into files of `shard_tokens` tokens, the last one shorter, and hashes what it writes."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.shards: list[dict] = []
        self.tokens = self.documents = self.filled = 0
        self.file = self.digest = None
        self.starts: list[np.ndarray] = []  # of documents, counted from the start of the split

    def begin_documents(self, starts: np.ndarray) -> None:
        """Announce the documents, by their starts within a unit, of the tokens that are written next."""
        self.starts.append((starts - starts[0] + np.uint64(self.tokens)).astype("<u8"))
        self.documents += len(starts)

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens (n,) of the writer's dtype."""
        while len(tokens):
            if self.file is None:
                self.file = open(self.folder / f"{self.split}_{len(self.shards):05d}.bin", "wb")  # noqa: SIM115 - _end_shard closes
                self.digest, self.filled = hashlib.sha256(), 0
            part, tokens = np.split(tokens, [self.shard_tokens - self.filled])
            self.file.write(part.data)
            self.digest.update(part.data)
            self.filled += len(part)
            self.tokens += len(part)
            if self.filled == self.shard_tokens:
                self._end_shard()

    def close(self) -> dict:
        """End the last shard; returns {tokens, documents, shards: [{name, tokens, sha256, documents, docs_sha256}]}."""
        if self.file is not None:
            self._end_shard()
        return {"tokens": self.tokens, "documents": self.documents, "shards": self.shards}

    def _end_shard(self) -> None:
        _end_file(self.file)
        starts = np.concatenate(self.starts) if self.starts else np.zeros(0, "<u8")
        here, later = np.split(starts, [np.searchsorted(starts, self.tokens)])
        here = (here - np.uint64(self.tokens - self.filled)).astype("<u8")
        with open(docs_path(Path(self.file.name)), "wb") as file:
            file.write(here.data)
            _end_file(file)
        self.shards.append(
            {
                "name": Path(self.file.name).name,
                "tokens": self.filled,
                "sha256": self.digest.hexdigest(),
                "documents": len(here),
                "docs_sha256": hashlib.sha256(here.data).hexdigest(),
            }
        )
        self.starts = [later]
        self.file = None


def docs_path(shard: Path) -> Path:
    """The side file with the document starts of a shard."""
    return shard.with_suffix(".docs.bin")


def _documents(unit: Path) -> np.ndarray:
    return np.fromfile(unit.with_suffix(".docs"), DOCUMENT)


def _runs(flags: np.ndarray) -> Iterator[tuple[int, int, bool]]:
    """(first, last + 1, flag) of each run of equal flags."""
    edges = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]
    for first, last in itertools.pairwise(edges):
        if first < last:
            yield first, last, bool(flags[first])


def _blocks(tokens: int) -> Iterator[int]:
    while tokens > 0:
        yield min(tokens, BLOCK)
        tokens -= BLOCK


def _end_file(file) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
