"""The rule's passes, Newton–Schulz and the last step as Triton kernels, which `passes_for` chooses on NVIDIA GPUs.

Each stands beside a plain function that it must equal: `passes` beside `celo2.blocked`, `symmetric` beside
`celo2.orthogonalize`. `device` is the code that runs on the GPU for `passes`, `traffic` counts its bytes.
"""

import functools
import importlib.util

import torch

from celo2.blocked import PLAIN, Passes


@functools.cache
def passes_for(device: torch.device) -> Passes:
    """The Triton kernels on NVIDIA GPUs of compute capability 8.0 (the first with bfloat16 products) or more, else PLAIN."""
    if device.type != "cuda" or torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return PLAIN
    if torch.cuda.get_device_capability(device) < (8, 0):
        return PLAIN
    from celo2.kernels.passes import TRITON

    return TRITON
