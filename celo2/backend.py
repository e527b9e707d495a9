"""Which functions carry out the passes of the rule on a device: plain torch, or Triton kernels on CUDA."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from celo2 import blocked, orthogonalize
from celo2.blocked import Factors, Stack
from celo2.rule import Rule

Options = dict[str, Any]  # a param group


@dataclass(frozen=True)
class Backend:
    """The passes of the rule; every backend computes what `PLAIN`, the reference, computes."""

    directions_: Callable[[Rule, Sequence[Stack], Tensor], None]
    accumulate_: Callable[[Rule, Stack], Tensor]
    factor: Callable[[Stack], tuple[Factors, Tensor]]
    emit_: Callable[[Rule, Stack, Tensor, Factors, Tensor, list[Tensor]], None]
    newton_schulz: Callable[[Tensor], Tensor]
    apply_: Callable[[Tensor, Tensor, Tensor, Options], None]


def apply_(w: Tensor, u: Tensor, scale: Tensor | float, options: Options) -> None:
    """Step 10, in place: `W <- W - lr (u scale + weight_decay W)`, in float32 whatever the dtype of w.

    Args:
        w: weights (..., r, c).
        u: direction of the same shape, any float dtype.
        scale: 1 / RMS of u over a whole matrix or vector, float32, of a shape that broadcasts.
        options: the param group; its `lr` is a number or a tensor of one element.
    """
    lr, weight_decay = options["lr"], options["weight_decay"]
    updated = w.to(torch.promote_types(w.dtype, torch.float32)).mul_(1 - lr * weight_decay).sub_((u * scale).mul_(lr))
    if updated is not w:
        w.copy_(updated)


PLAIN = Backend(blocked.directions_, blocked.accumulate_, blocked.factor, blocked.emit_, orthogonalize.newton_schulz, apply_)


@functools.cache
def triton_backend() -> Backend:
    """The kernels of `celo2.kernels`; imports triton."""
    from celo2.kernels import passes, symmetric

    return Backend(passes.directions_, passes.accumulate_, passes.factor, passes.emit_, symmetric.newton_schulz, passes.apply_)


@functools.cache
def backend(device: torch.device) -> Backend:
    """The kernels on NVIDIA GPUs of compute capability 8.0 (the first with bfloat16 products) or more, else PLAIN."""
    if device.type != "cuda" or torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return PLAIN
    return triton_backend() if torch.cuda.get_device_capability(device) >= (8, 0) else PLAIN
