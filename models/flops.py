"""How much arithmetic a token costs, and how much a device can do: what model FLOPs utilization (MFU) is made of."""

import re

import torch
from torch import nn
from transformers import PreTrainedModel


def flops_per_token(model: PreTrainedModel, context: int | None = None) -> float:
    """Floating-point operations of one token, forward and backward, in a sequence of `context` (the model's) tokens.

    The convention of PaLM (arXiv 2204.02311, appendix B) and nanoGPT: 6 N + 12 L H K T. N are the parameters in matmuls
    (two axes or more, the output projection included even when tied, embedding look-ups excluded; of stacked experts
    the share that one token visits), 6 = multiply and add, once forward and twice backward. L layers, H heads of K, T
    tokens: the two matmuls of attention, counted over the whole square, causal mask and sliding windows disregarded.
    Recomputation by gradient checkpointing is not counted: MFU counts useful work. Call it before sharding.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if head is not None:
        looked_up.discard(id(head.weight))
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    visited = getattr(config, "num_experts_per_tok", None)
    multiplied = 0.0
    for parameter in model.parameters():
        if parameter.ndim < 2 or id(parameter) in looked_up:
            continue
        stacked = experts and visited and parameter.ndim == 3 and parameter.shape[0] == experts  # (experts, out, in)
        multiplied += parameter.numel() * (visited / experts if stacked else 1)
    context = getattr(config, "max_position_embeddings", 0) if context is None else context
    heads = getattr(config, "num_attention_heads", 0)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    return 6 * multiplied + 12 * config.num_hidden_layers * heads * head_size * context


# Dense peak of the matrix units in FLOP/s, without sparsity, accumulating in float32, per device that torch shows: from
# the makers' data sheets (which often print twice these, with sparsity). The words of a device's name, all of them.
_PEAKS = {
    "B200": 2250e12,
    "GB200": 2500e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIE": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A100 PCIE": 312e12,
    "A800": 312e12,
    "A800 PCIE": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
}
# Words that do not change the speed: maker, family, memory size and kind, and the socket that the plain row is for.
_NOISE = re.compile(r"NVIDIA|AMD|INSTINCT|TESLA|GEFORCE|OAM|\d+GB|HBM3E?|SXM\d?")


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak dense FLOP/s in bfloat16 or float16 of what torch.cuda.get_device_name() calls `device_name`.

    None for any other dtype, for the CPU, and for every name that is not wholly understood (a MIG slice, a laptop's
    chip, a new model): no MFU is better than a wrong one.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    words = [word for word in re.split(r"[\s\-]+", device_name.upper()) if not _NOISE.fullmatch(word)]
    return _PEAKS.get(" ".join(words))
