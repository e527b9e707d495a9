"""Gives weights to a model whose parameters have no memory: whole, as local shards, or only during a computation.

`weights` is their source (`models.initialization.Weights`): the architecture's initialization, files, or a model in memory. Each
strategy reads only the weights that its rank keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from launch.distributed.blocks import blocks_of
from models import ModelError
from models.initialization import Weights, become

PIECE = 1 << 22  # elements that are made or read at once, 16 MB
Result = TypeVar("Result")


class WithProgress:
    """Wraps `weights` and calls `progress` at every read: making or reading a large model takes long, but the rank is working."""

    def __init__(self, weights: Weights, progress: Callable[[], None]) -> None:
        self.weights, self.progress = weights, progress

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the elements [start, stop) of the flattened parameter `name`."""
        self.progress()
        return self.weights.read(name, start, stop)

    @property
    def not_finite(self) -> Collection[str]:
        """The parameters in which reading has found a number that is not finite, for weights from files; else empty."""
        return getattr(self.weights, "not_finite", ())


def fill(target: Tensor, weights: Weights, name: str, start: int = 0) -> None:
    """Fill `target`, which is contiguous and on any device, with the elements of the parameter `name` from `start` on."""
    flat = target.detach().view(-1)
    for at in range(0, len(flat), PIECE):
        end = min(at + PIECE, len(flat))
        flat[at:end].copy_(weights.read(name, start + at, start + end))


def whole(p: Tensor, weights: Weights, name: str, device: torch.device) -> Tensor:
    """Return the parameter `name` with the shape and dtype of `p`, on `device`, without a second copy in memory."""
    if device.type == "cpu":
        return weights.read(name, 0, p.numel()).to(device, p.dtype).view(p.shape)
    value = torch.empty(p.shape, dtype=p.dtype, device=device)
    fill(value, weights, name)
    return value


def fill_whole(model: nn.Module, weights: Weights, device: torch.device) -> None:
    """Give every parameter of `model` memory on `device`, and its value."""
    for name, p in model.named_parameters():
        become(p, whole(p, weights, name, device))


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers of `model`, which have their values already, to `device`."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            if buffer.device != device:
                setattr(module, name, buffer.to(device))


def with_weights(model: PreTrainedModel, weights: Weights, compute: Callable[[PreTrainedModel], Result]) -> Result:
    """Return `compute(model)` for a model without memory, on the CPU. Only the block that is computing is in memory.

    If the architecture uses the weights of a block outside of that block, the whole model is in memory.
    """
    try:
        with in_memory(model, weights, blocks_of(model)):
            return compute(model)
    except ModelError:
        with in_memory(model, weights, []):
            return compute(model)


@contextmanager
def in_memory(model: nn.Module, weights: Weights, blocks: list[nn.Module]) -> Iterator[None]:
    """In this context, each of `blocks` has its weights only during its forward pass. All other modules always have theirs."""
    names = {p: name for name, p in model.named_parameters()}
    inner = {module for block in blocks for module in block.modules()}
    outside = {p for module in model.modules() if module not in inner for p in module.parameters(recurse=False)}

    def load(parameters: Iterable[nn.Parameter]) -> None:
        for p in parameters:
            if p.is_meta:
                become(p, whole(p, weights, names[p], torch.device("cpu")))

    def release(parameters: Iterable[nn.Parameter]) -> None:
        for p in parameters:
            if not p.is_meta:
                become(p, torch.empty_like(p, device="meta"))

    handles = []
    for block in blocks:
        own = [p for p in block.parameters() if p not in outside]
        handles.append(block.register_forward_pre_hook(lambda *_, own=own: load(own)))
        handles.append(block.register_forward_hook(lambda *_, own=own: release(own), always_call=True))
    try:
        load(outside)
        yield
    finally:
        for handle in handles:
            handle.remove()
        release(names)
