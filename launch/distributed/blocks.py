"""Finds the transformer blocks of a model, which are sharded and compiled one by one."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn
from transformers import PreTrainedModel

from configs.load import ConfigError


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks: the ModuleList with the most parameters; empty if the model has none."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=()))


def required_blocks(model: nn.Module) -> list[nn.Module]:
    """Return `blocks_of(model)` for fsdp2. Raises ConfigError if there are none."""
    blocks = blocks_of(model)
    if not blocks:
        raise ConfigError(f"distributed.strategy fsdp2: {type(model).__name__} has no list of blocks to shard")
    return blocks


def compile_blocks(model: PreTrainedModel, device: torch.device) -> None:
    """Compile every block separately, so that equal blocks share one compilation for any number of layers.

    Raises:
        ConfigError: there are no blocks, or no compiler for the code that torch generates.
    """
    names = compilers(device)
    if not any(shutil.which(name) for name in names):
        raise ConfigError(
            f"train.compile needs the compiler {' or '.join(names)}, which was not found; train.compile=false needs none"
        )
    blocks = blocks_of(model)
    if not blocks:
        raise ConfigError(f"train.compile: {type(model).__name__} has no list of blocks to compile")
    for block in blocks:
        block.compile()


def compilers(device: torch.device) -> list[str]:
    """Return the compilers, of which torch.compile needs one: it generates C++ for the CPU; for a GPU, Triton compiles C."""
    chosen = os.environ.get("CXX" if device.type == "cpu" else "CC", "").split()
    return chosen[:1] or (["g++"] if device.type == "cpu" else ["gcc", "clang"])
