"""Writes encoded units into the shards of the training and the validation split, in the order of the source.

NAME.bin holds token ids without a header. NAME.docs.bin holds, as uint64, the position in NAME.bin of each document that
begins in this shard; a document may continue in the next shard. Everything is little-endian.
"""

import hashlib
from array import array
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.files import replacing, sync
from data.preparation.split import Cut, Split, read_documents
from data.shards import docs_path


def assemble(
    units: list[Path], folder: Path, dtype: np.dtype, split: Split, cut: Cut | None, shard_tokens: int
) -> dict[str, dict]:
    """Write the shards of both splits into `folder`. Returns their entries in index.json.

    cut: the two parts of the document that `split` cuts.
    """
    writers = {name: ShardWriter(folder, name, shard_tokens) for name in ("train", "val")}
    for i, unit in enumerate(units):
        documents, stops = read_documents(unit, dtype)
        if not len(documents):  # an empty file cannot be mapped
            continue
        tokens = np.asarray(np.memmap(unit.with_suffix(".tokens"), dtype, "r"))
        rows = zip(*(documents[name].tolist() for name in ("start", "hash", "bytes")), stops.tolist(), strict=True)
        for j, (start, text_hash, n_bytes, stop) in enumerate(rows):
            if split.cut == (i, j):
                assert cut is not None
                for writer, part in zip(writers.values(), cut, strict=True):
                    if part is not None:
                        writer.write(*part)
            else:
                writers[split.name(i, j, text_hash)].write(tokens[start:stop], n_bytes)
    return {name: writer.close() for name, writer in writers.items()}


class ShardWriter:
    """Writes one split's documents into files of `shard_tokens` tokens, the last one shorter, and hashes what it writes."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.shards: list[dict] = []  # finished shards
        self.tokens = self.documents = self.bytes = 0  # totals of the split
        self.file: BinaryIO | None = None

    def write(self, tokens: np.ndarray, n_bytes: int) -> None:
        """Append one document (n,), n > 0, of `n_bytes` bytes of UTF-8 text."""
        first = True
        self.bytes += n_bytes
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
        """End the last shard. Returns {tokens, documents, bytes, shards: [{name, tokens, sha256, documents, docs_sha256}]}."""
        self._end_shard()
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes, "shards": self.shards}

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
