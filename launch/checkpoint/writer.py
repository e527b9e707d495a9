"""Writes a safetensors file tensor by tensor, computes its hash and flushes it. Only one tensor is in memory at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from launch.distributed.host_group import as_bytes

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
PIECE = 64 << 20  # bytes of one write
FLUSH = 256 << 20  # bytes between two flushes to disk, so that no flush takes long
Progress = Callable[[], None]  # called after each piece of work


def no_progress() -> None:
    """A `Progress` that does nothing."""


class TensorHeader(NamedTuple):
    """The description of a tensor in a file that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Written(NamedTuple):
    """The description of a file that is written and flushed."""

    name: str
    bytes: int
    sha256: str
    tensors: tuple[str, ...] = ()
    tensor_bytes: int = 0


class TensorWriter:
    """A new safetensors file of the tensors `entries`, which must be written in this order. Raises OSError if the disk fails.

    For alignment, `entries` should begin with the tensors that have the largest elements.
    """

    def __init__(self, path: Path, entries: Sequence[TensorHeader], progress: Progress = no_progress) -> None:
        self.path, self.progress, self.names = path, progress, tuple(entry.name for entry in entries)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers requires it
        self.tensor_bytes = 0
        for name, dtype, shape in entries:
            start, self.tensor_bytes = self.tensor_bytes, self.tensor_bytes + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, self.tensor_bytes]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.digest, self.bytes, self.flushed = hashlib.sha256(), 0, 0
        self.file = path.open("xb", buffering=0)
        try:
            self._write(memoryview(len(text).to_bytes(8, "little") + text))
        except BaseException:
            self.file.close()
            raise

    def write(self, tensor: Tensor) -> None:
        """Write the next tensor, which is in CPU memory."""
        self._write(memoryview(as_bytes(tensor.contiguous()).numpy()))  # type: ignore[arg-type]

    def close(self) -> Written:
        """Flush the file to disk. Returns its description."""
        with self.file:
            os.fsync(self.file.fileno())
        return Written(self.path.name, self.bytes, self.digest.hexdigest(), self.names, self.tensor_bytes)

    def abandon(self) -> None:
        """Close an incomplete file."""
        self.file.close()

    def _write(self, data: memoryview) -> None:
        while data:
            count = self.file.write(data[:PIECE])
            self.digest.update(data[:count])
            data, self.bytes = data[count:], self.bytes + count
            if self.bytes - self.flushed >= FLUSH:
                os.fsync(self.file.fileno())
                self.flushed = self.bytes
            self.progress()


def write_small(path: Path, content: str) -> Written:
    """Write a new text file and flush it to disk. Returns its description."""
    data = content.encode("utf-8")
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Written(path.name, len(data), hashlib.sha256(data).hexdigest())
