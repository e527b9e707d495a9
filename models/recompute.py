"""Activation checkpointing: which activations of a block the backward pass recomputes, instead of keeping them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

OPERATIONS = "operations"  # the choice by operation
# Operations that take long, and whose results that choice keeps: matrix products and attention, on every kind of device.
KEPT = [
    getattr(torch.ops.aten, name).default
    for name in (
        "mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(torch.ops.aten, name)
]  # fmt: skip


def every(choice: bool | int | str) -> int:
    """The interval of the recomputed blocks: 1 is every block, 2 every second one, 0 none. "operations" is 1.

    `choice`: false, true, a number of blocks, or "operations", also as text. Raises ValueError for anything else.
    """
    text = str(choice).lower()
    if text in ("true", "yes", "on", OPERATIONS):
        return 1
    if text in ("false", "no", "off"):
        return 0
    if not text.isdecimal():
        raise ValueError(f"gradient_checkpointing is {choice!r}, expected false, true, operations, or a number of blocks")
    return int(text)


def recompute(model: PreTrainedModel, choice: bool | int | str) -> None:
    """Make the backward pass of `model` recompute activations, as `choice` says. Gradients stay the same bit for bit.

    Raises ValueError if the architecture does not support it.
    """
    if not (interval := every(choice)):
        return
    if not model.supports_gradient_checkpointing:
        raise ValueError(f"{type(model).__name__} does not support gradient_checkpointing")
    options: dict[str, Any] = {"use_reentrant": False}
    if str(choice).lower() == OPERATIONS:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)
    # transformers 5.23 renamed the method.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
    if interval == 1:
        return
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if len(blocks) < 2:
        raise ValueError(f"{type(model).__name__} computes all its blocks again or none: gradient_checkpointing is true or false")
    for i, block in enumerate(blocks):
        block.gradient_checkpointing = i % interval == 0
