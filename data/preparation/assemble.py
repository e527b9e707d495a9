"""Encoded units into the shards of the training and the validation split, in the order of the source.

NAME.bin holds token ids without a header. NAME.docs.bin holds, as uint64, where in NAME.bin each document begins that
begins there; a document may continue in the next shard. Everything is little-endian.
"""

import hashlib
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.files import replacing, sync
from data.preparation.encode import DOCUMENT
from data.shards import docs_path


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
    limit = hash_limit((_documents(unit)["hash"] for unit in units), fraction)
    splits = {name: ShardWriter(folder, name, shard_tokens) for name in ("train", "val")}
    for unit in units:
        documents = _documents(unit)
        if not len(documents):  # an empty file cannot be mapped
            continue
        tokens = np.asarray(np.memmap(unit.with_suffix(".tokens"), dtype, "r"))
        starts = documents["start"].tolist()
        for start, stop, text_hash in zip(starts, [*starts[1:], len(tokens)], documents["hash"].tolist(), strict=True):
            splits["val" if text_hash < limit else "train"].write(tokens[start:stop])
    return {name: writer.close() for name, writer in splits.items()}


class ShardWriter:
    """Writes one split's documents into files of `shard_tokens` tokens, the last one shorter, and hashes what it writes."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.shards: list[dict] = []  # the finished ones
        self.tokens = self.documents = 0  # of the split
        self.file: BinaryIO | None = None

    def write(self, tokens: np.ndarray) -> None:
        """Append one document (n,), n > 0."""
        first = True
        while len(tokens):
            file = self.file or self._begin_shard()
            if first:
                self.starts.append(self.filled)
                self.documents += 1
                first = False
            part, tokens = tokens[: self.shard_tokens - self.filled], tokens[self.shard_tokens - self.filled :]
            file.write(part.data)
            self.digest.update(part.data)
            self.filled += len(part)
            self.tokens += len(part)
            if self.filled == self.shard_tokens:
                self._end_shard()

    def close(self) -> dict:
        """End the last shard; returns {tokens, documents, shards: [{name, tokens, sha256, documents, docs_sha256}]}."""
        self._end_shard()
        return {"tokens": self.tokens, "documents": self.documents, "shards": self.shards}

    def _begin_shard(self) -> BinaryIO:
        self.path = self.folder / f"{self.split}_{len(self.shards):05d}.bin"
        self.filled, self.digest, self.starts = 0, hashlib.sha256(), array("Q")
        self.file = open(self.path, "wb")  # noqa: SIM115 - _end_shard closes it
        return self.file

    def _end_shard(self) -> None:
        if self.file is None:
            return
        sync(self.file)
        self.file.close()
        self.file = None
        starts = np.array(self.starts, "<u8").tobytes()
        with replacing(docs_path(self.path)) as file:
            file.write(starts)
        self.shards.append(
            {
                "name": self.path.name,
                "tokens": self.filled,
                "sha256": self.digest.hexdigest(),
                "documents": len(self.starts),
                "docs_sha256": hashlib.sha256(starts).hexdigest(),
            }
        )


def _documents(unit: Path) -> np.ndarray:
    return np.fromfile(unit.with_suffix(".docs"), DOCUMENT)
