"""Writes a safetensors file tensor by tensor, with its hash, and flushes it. It holds nothing but the tensor it writes."""

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
PIECE = 64 << 20  # bytes that are written at once
FLUSH = 256 << 20  # bytes after which the disk must have them, so that no flush takes long
Progress = Callable[[], None]  # is called after each piece of work


def no_progress() -> None:
    """A `Progress` that does nothing."""


class TensorHeader(NamedTuple):
    """A tensor that a file will hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Written(NamedTuple):
    """A file that is on the disk."""

    name: str
    bytes: int
    sha256: str
    tensors: tuple[str, ...] = ()
    tensor_bytes: int = 0


class TensorWriter:
    """A new safetensors file of `entries`, which are written in this order. OSError where the disk does not take them.

    The order decides how tensors are aligned: those with larger elements come first.
    """

    def __init__(self, path: Path, entries: Sequence[TensorHeader], progress: Progress = no_progress) -> None:
        self.path, self.progress, self.names = path, progress, tuple(entry.name for entry in entries)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
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
        """Add the next tensor, in CPU memory."""
        self._write(memoryview(as_bytes(tensor.contiguous()).numpy()))  # type: ignore[arg-type]

    def close(self) -> Written:
        """Flush the file to disk."""
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
    """A file of text on the disk."""
    data = content.encode("utf-8")
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Written(path.name, len(data), hashlib.sha256(data).hexdigest())
