"""Triton kernels for the passes of the rule and for Newton–Schulz; `passes_for` chooses them on NVIDIA GPUs.

Each kernel must compute the same as a plain function: `passes` the same as `celo2.blocked`, `symmetric` the same as
`celo2.orthogonalize`. `device` holds the GPU code of `passes`; `traffic` counts the bytes that it moves.
"""

import functools
import importlib.util

import torch

from celo2.blocked import PLAIN, Passes


@functools.cache
def passes_for(device: torch.device) -> Passes:
    """The Triton kernels on NVIDIA GPUs of compute capability 8.0 (the first with bfloat16 products) or higher; else PLAIN."""
    if device.type != "cuda" or torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return PLAIN
    if torch.cuda.get_device_capability(device) < (8, 0):
        return PLAIN
    from celo2.kernels.passes import TRITON

    return TRITON
