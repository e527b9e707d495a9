"""How a model without memory gets its weights: whole, as local shards, or for the time of a computation.

`weights` says where they come from (`models.initialization.Weights`): the architecture's initialization, files, or a model in
memory. Each strategy asks for what its rank keeps and for nothing else.
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

PIECE = 1 << 22  # elements that are made or read at once on their way to where they stay: 16 MB
Result = TypeVar("Result")


class WithProgress:
    """`weights`, of which every read is told to `progress`: to make or read a large model takes long, and is work."""

    def __init__(self, weights: Weights, progress: Callable[[], None]) -> None:
        self.weights, self.progress = weights, progress

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """The elements [start, stop) of the flattened parameter `name`."""
        self.progress()
        return self.weights.read(name, start, stop)

    @property
    def not_finite(self) -> Collection[str]:
        """The parameters in which a number was read that is not finite, of weights that come from files."""
        return getattr(self.weights, "not_finite", ())


def fill(target: Tensor, weights: Weights, name: str, start: int = 0) -> None:
    """Write the elements of the parameter `name` from `start` on into `target`, contiguous and on any device."""
    flat = target.detach().view(-1)
    for at in range(0, len(flat), PIECE):
        end = min(at + PIECE, len(flat))
        flat[at:end].copy_(weights.read(name, start + at, start + end))


def whole(p: Tensor, weights: Weights, name: str, device: torch.device) -> Tensor:
    """The parameter `name`, of the shape and dtype of `p`, on `device`. It is in memory once."""
    if device.type == "cpu":
        return weights.read(name, 0, p.numel()).to(device, p.dtype).view(p.shape)
    value = torch.empty(p.shape, dtype=p.dtype, device=device)
    fill(value, weights, name)
    return value


def fill_whole(model: nn.Module, weights: Weights, device: torch.device) -> None:
    """Give every parameter of `model` its memory on `device`, and its value."""
    for name, p in model.named_parameters():
        become(p, whole(p, weights, name, device))


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Bring the buffers of `model`, which have their values, to `device`."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            if buffer.device != device:
                setattr(module, name, buffer.to(device))


def with_weights(model: PreTrainedModel, weights: Weights, compute: Callable[[PreTrainedModel], Result]) -> Result:
    """`compute(model)` of a model without memory, on the CPU: no block is in memory but the one that computes.

    Of an architecture that uses the weights of a block from outside of it, all are.
    """
    try:
        with in_memory(model, weights, blocks_of(model)):
            return compute(model)
    except ModelError:
        with in_memory(model, weights, []):
            return compute(model)


@contextmanager
def in_memory(model: nn.Module, weights: Weights, blocks: list[nn.Module]) -> Iterator[None]:
    """Until the end of the context each of `blocks` has its weights while its forward pass runs, and what is outside of them has
    its weights throughout."""
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
