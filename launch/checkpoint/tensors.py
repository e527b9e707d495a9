"""Named tensors in safetensors files: `model.safetensors`, or the files that `model.safetensors.index.json` lists."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from data.files import read_json

INDEX = ".index.json"  # suffix to the name of a file that is divided into several; the index has Hugging Face's format


class TensorFiles:
    """The tensors of one file, or of the files into which it is divided, open for reading. Tensors are read on demand.

    Raises:
        FileNotFoundError: there is neither the file nor an index.
        SafetensorError, ValueError: a file or the index is damaged, or a tensor is in two files.
    """

    def __init__(self, path: Path) -> None:
        """`path`: the name of the single file, such as `step_00000100/model.safetensors`, even if it is divided."""
        self.files: dict[str, Any] = {}  # the open file of each tensor
        self._stack = ExitStack()
        try:
            for file in files_of(path):
                opened = self._stack.enter_context(safe_open(file, "pt"))
                if twice := sorted(self.files.keys() & opened.keys()):
                    raise ValueError(f"{file} holds {twice[0]}, which another file beside it holds, too")
                self.files |= dict.fromkeys(opened.keys(), opened)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def keys(self) -> list[str]:
        """The names of all tensors."""
        return list(self.files)

    def get_tensor(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        return self.files[name].get_tensor(name)

    def get_slice(self, name: str) -> Any:
        """A lazy tensor with `get_shape()` and `get_dtype()`. Indexing it reads only that part."""
        return self.files[name].get_slice(name)


def is_there(path: Path) -> bool:
    """Return whether the tensors of `path` exist, in one file or divided."""
    return path.is_file() or path.with_name(path.name + INDEX).is_file()


def part_name(whole: str, number: int, total: int) -> str:
    """Return the name of one of the `total` files into which `whole` is divided; `number` counts from 1."""
    stem, _, suffix = whole.partition(".")
    return f"{stem}-{number:05d}-of-{total:05d}.{suffix}"


def make_index(files: Mapping[str, Collection[str]], total_bytes: int) -> str:
    """Return the index, as JSON, of tensors that are divided over `files`."""
    weight_map = {name: file for file, names in files.items() for name in sorted(names)}
    return json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=1)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of `path`, on the CPU."""
    with TensorFiles(path) as files:
        return {name: files.get_tensor(name) for name in files.keys()}  # noqa: SIM118


def files_of(path: Path) -> list[Path]:
    """Return the files that hold the tensors of `path`: `path` itself, or the files that its index lists.

    Raises:
        ValueError: the index is damaged, or names something else than a file in the same folder.
    """
    index = path.with_name(path.name + INDEX)
    if path.exists() or not index.exists():
        return [path]
    try:
        names = {str(name) for name in read_json(index)["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is damaged") from None
    if outside := sorted(name for name in names if Path(name).name != name):
        raise ValueError(f"{index} names {outside[0]!r}, which is not a file in the same folder")
    return [path.with_name(name) for name in sorted(names)]
