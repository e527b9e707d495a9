"""Measures the largest attention logit of every block by intercepting the model's calls of torch functions.

Legend: B sequences, H heads, T queries, S keys, K features of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from launch.distributed.blocks import blocks_of

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class AttentionLogits(TorchFunctionMode):
    """A context manager in which forward passes update `largest`: one number for each block in `names`, -inf if none was seen.

    Logits are the inputs of the softmax: q k scale plus the mask. The logits inside `scaled_dot_product_attention` are not
    visible, so they are computed again from its arguments, in float32.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        names = {module: name for name, module in model.named_modules()}
        self.blocks = blocks_of(model)
        self.names = [names[block] for block in self.blocks]
        self.largest = torch.full((len(self.blocks),), -math.inf, device=device)
        self.block: int | None = None
        self.handles: list[Any] = []

    def __enter__(self) -> AttentionLogits:
        for i, block in enumerate(self.blocks):
            self.handles.append(block.register_forward_pre_hook(lambda *_, i=i: setattr(self, "block", i)))
            self.handles.append(block.register_forward_hook(lambda *_: setattr(self, "block", None)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.block is not None:
            if func is F.scaled_dot_product_attention:
                with torch.autocast(self.largest.device.type, enabled=False):
                    self._add(largest_logit(*args, **kwargs))
            elif func in SOFTMAX and args and args[0].ndim == 4:  # (B, H, T, S)
                self._add(args[0].amax().float())
        return func(*args, **kwargs)

    def _add(self, value: Tensor) -> None:
        assert self.block is not None
        self.largest[self.block] = torch.maximum(self.largest[self.block], value)


def largest_logit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the largest logit (B, H, T, S) of `scaled_dot_product_attention` with the same arguments, as float32 ().

    Computes one sequence at a time to save memory.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    T, S = query.shape[-2], key.shape[-2]
    causal = torch.ones(T, S, dtype=torch.bool, device=query.device).tril() if is_causal else None
    found = torch.tensor(-math.inf, device=query.device)
    for b in range(query.shape[0]):
        q, k = query[b].float(), key[b].float()  # (H, T, K), (H, S, K)
        if enable_gqa:
            k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
        logits = q @ k.mT * scale  # (H, T, S)
        mask = causal if attn_mask is None else attn_mask.broadcast_to(*query.shape[:-1], S)[b]
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
        found = torch.maximum(found, logits.amax())
    return found
