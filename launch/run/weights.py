"""Weights in safetensors files, of `model.init` or of a run that resumes. Each rank reads only its part of them.

`file_weights` finds each parameter of a model in the files. If the files store weights in another form than the model has them
(transformers' conversions), transformers must read them as a whole instead.
"""

from __future__ import annotations

import hashlib
import math
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from celo2.distributed.collectives import gather_objects
from configs.load import ConfigError
from launch.checkpoint.tensors import TensorFiles
from launch.checkpoint.writer import Progress, no_progress
from launch.distributed.buffers import persistent_buffers
from launch.private import ignored_in_files
from launch.run.ranks import Fact, require_same
from models.gpt2 import origins
from models.initialization import Weights

OPEN = 1 << 28  # the files are reopened after reading this many bytes: pages read from an open, mapped file count as memory
BLOCK = 1 << 26  # bytes that a rank reads and hashes at once


class FileWeights:
    """Weights of a model in files.

    Attributes:
        not_finite: the parameters in which `read` has found a number that is not finite.
    """

    def __init__(self, path: Path, names: Mapping[str, str]) -> None:
        """`path`: as for `TensorFiles`. `names`: the name in the files of each parameter of the model."""
        self.path, self.names = path, dict(names)
        self.not_finite: set[str] = set()
        self.files, self.bytes = TensorFiles(path), 0

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the elements [start, stop) of the flattened parameter `name`, in the dtype of the file."""
        if self.bytes > OPEN:
            self.files.__exit__()
            self.files, self.bytes = TensorFiles(self.path), 0
        part = self.files.get_slice(self.names[name])
        row = math.prod(part.get_shape()[1:])
        first, last = (start // row, -(-stop // row)) if row else (0, 0)
        rows = part[first:last] if part.get_shape() else self.files.get_tensor(self.names[name])
        self.bytes += rows.nbytes
        values = rows.reshape(-1)[start - first * row : stop - first * row]
        if not values.isfinite().all():
            self.not_finite.add(name)
        return values.clone()  # safetensors may return a view of the mapped file, which can change


class FromGPT2:
    """The weights of a GPT-3, converted from a GPT-2 that computes the same function. Holds one tensor of the GPT-2 at a time."""

    def __init__(self, gpt2: FileWeights, shapes: Mapping[str, tuple[int, ...]], layers: int) -> None:
        """`shapes`: of the GPT-2's parameters. `layers`: its number of blocks."""
        self.gpt2, self.shapes, self.origins = gpt2, shapes, origins(layers)
        self.held: tuple[str, Tensor] = "", torch.empty(0)

    @property
    def not_finite(self) -> set[str]:
        """As in `FileWeights`, with the parameter names of the GPT-3."""
        return {name for name, origin in self.origins.items() if origin.name in self.gpt2.not_finite}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the elements [start, stop) of the flattened parameter `name`, in the dtype of the file."""
        origin = self.origins[name]
        if self.held[0] != origin.name:
            shape = self.shapes[origin.name]
            self.held = origin.name, self.gpt2.read(origin.name, 0, math.prod(shape)).view(shape)
        return origin.of(self.held[1]).reshape(-1)[start:stop].clone()


def file_weights(path: Path, model: PreTrainedModel) -> FileWeights | None:
    """Return the weights of `model` in the files of `path`, and fill the buffers of `model` from them.

    Returns None unless the files hold exactly the model's weights, in the model's form.
    """
    try:
        with TensorFiles(path) as files:
            names = names_in({name: tuple(files.get_slice(name).get_shape()) for name in files.keys()}, model)  # noqa: SIM118
            if names is None:
                return None
            with torch.no_grad():
                for name, buffer in persistent_buffers(model).items():
                    buffer.copy_(files.get_tensor(names[name]))
        return FileWeights(path, names)
    except (OSError, ValueError, SafetensorError):  # damaged: the next reader reports it
        return None


def names_in(there: Mapping[str, tuple[int, ...]], model: PreTrainedModel) -> dict[str, str] | None:
    """Map each parameter and buffer of `model` to its name in files. `there`: the names and shapes of the tensors in the files.

    Returns None unless these are exactly the tensors of the model. A tied parameter may have any of its names in the files, and
    the prefix of the base model may be missing.
    """
    conversions = get_model_conversion_mapping(model)
    if any(set(c.source_patterns) & set(c.target_patterns) and getattr(c, "operations", []) for c in conversions):
        return None  # stored under the same name, but in another form
    found: dict[str, str] = {}
    called: dict[Tensor, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        called.setdefault(p, []).append(name)
    prefix = f"{model.base_model_prefix}."
    for own, names in (*called.items(), *((b, [name]) for name, b in persistent_buffers(model).items())):
        held = [n for name in names for n in {name, name.removeprefix(prefix)} if n in there]
        if len(held) != 1 or there[held[0]] != tuple(own.shape):
            return None
        found[names[0]] = held[0]
    ignored = ignored_in_files(model)
    rest = there.keys() - set(found.values())
    return None if any(not any(re.search(pattern, name) for pattern in ignored) for name in rest) else found


def require_finite(accelerator: Accelerator, weights: Weights, files: list[Path]) -> None:
    """Raise ConfigError, on every rank, if a rank has read numbers from `model.init` that are not finite.

    Every rank must call it. `files`: the files that the weights come from; if it is empty, nothing is checked.
    """
    if not files:
        return
    bad = sorted(getattr(weights, "not_finite", ()))
    if accelerator.num_processes > 1:
        bad = sorted({name for names in gather_objects(bad, dist.group.WORLD) for name in names})  # type: ignore[arg-type]
    if bad:
        raise ConfigError(
            f"model.init: {files[0].parent} has numbers in {bad[0]} that are not finite: take an earlier checkpoint"
        )


def require_same_files(accelerator: Accelerator, files: list[Path], progress: Progress = no_progress) -> None:
    """Raise ConfigError, on every rank, unless all ranks have the same files. Every rank must call it.

    Ranks on one host that read the same files share the work of hashing. `progress` is called after each block.
    """
    if accelerator.num_processes == 1 or not files:
        return
    where = socket.gethostname(), [str(file.resolve()) for file in files]
    everyone = gather_objects(where, dist.group.WORLD)  # type: ignore[arg-type]
    beside = [rank for rank, other in enumerate(everyone) if other == where]
    mine = hashes(files, beside.index(accelerator.process_index), len(beside), progress)
    parts = gather_objects(mine, dist.group.WORLD)  # type: ignore[arg-type]
    require_same(accelerator, lambda: [weights_fact([part for rank in beside for part in parts[rank]])])


class Block(NamedTuple):
    """The hash of a part of a file."""

    file: int
    start: int
    sha256: str


def hashes(files: list[Path], part: int = 0, parts: int = 1, progress: Progress = no_progress) -> list[Block]:
    """Hash every `parts`-th block of `files`, from number `part` on. Files are read, not mapped, so that they take no memory."""
    starts = [(i, start) for i, file in enumerate(files) for start in range(0, file.stat().st_size, BLOCK)]
    found = []
    for i, start in starts[part::parts]:
        with files[i].open("rb") as opened:
            opened.seek(start)
            found.append(Block(i, start, hashlib.sha256(opened.read(BLOCK)).hexdigest()))
        progress()
    return found


def weights_fact(blocks: list[Block]) -> Fact:
    """Return the fact about the weights of `model.init`: a hash of the hashes of all blocks."""
    value = hashlib.sha256(repr(sorted(blocks)).encode()).hexdigest()[:12]
    return Fact("the weights of model.init", value, "let model.init hold the same weights on every node")
