"""The FLOPs that a token costs, and the FLOP/s that a device can do. Model FLOPs utilization (MFU) needs both."""

import re

import torch
from torch import nn
from transformers import PreTrainedModel

from models.function import flat

# What configurations call the number of experts of a layer, and how many of them a token visits.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
VISITED = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


def flops_per_token(model: PreTrainedModel, context: int | None = None) -> float:
    """FLOPs of one token, forward and backward, in a sequence of `context` tokens (by default the model's).

    The convention of PaLM (arXiv 2204.02311, appendix B) and nanoGPT: 6 N + 12 L H K T.
    6 N: N parameters in matmuls; multiply and add, once forward and twice backward. They are those with two axes or
    more, the output projection included even when tied, embedding look-ups excluded; of stacked experts, the share that
    one token visits.
    12 L H K T: the two matmuls of attention in L layers with H heads of size K over T tokens. The whole square counts:
    the causal mask and sliding windows are disregarded.
    Recomputation by gradient checkpointing does not count: MFU measures useful work. Call it before sharding.
    """
    config = model.config.get_text_config()
    values = config.to_dict()  # an attribute that differs between layers cannot be read
    nested = {key.rpartition(".")[2]: value for key, value in flat(values).items()}  # DBRX has them in `ffn_config`

    def number(name: str) -> int:
        return values.get(config.attribute_map.get(name, name)) or 0

    def first(names: tuple[str, ...]) -> int:
        return next((found for name in names if (found := number(name) or nested.get(name) or 0)), 0)

    head = model.get_output_embeddings()
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if head is not None:
        looked_up.discard(id(head.weight))
    experts = first(EXPERTS)
    visited = first(VISITED) or experts
    multiplied = 0.0
    counted = set(looked_up)
    for module in model.modules():
        flattened = type(module).__name__ == "DbrxExpertGLU"  # (experts * out, in)
        for parameter in module.parameters(recurse=False):
            if parameter.ndim < 2 or id(parameter) in counted:
                continue
            counted.add(id(parameter))
            count = experts if flattened else parameter.shape[0]  # of a stack (experts, out, in)
            stacked = flattened or (parameter.ndim == 3 and count in (experts, experts + number("zero_expert_num")))
            multiplied += parameter.numel() * (visited / count if experts and stacked else 1)
    context = number("max_position_embeddings") if context is None else context
    heads = number("num_attention_heads")
    head_size = number("head_dim") or number("hidden_size") // max(heads, 1)
    return 6 * multiplied + 12 * number("num_hidden_layers") * heads * head_size * context


# Dense peak of the matrix units in FLOP/s, accumulating in float32, of what torch shows as one device. From the makers'
# data sheets, which often print twice these numbers, with sparsity. A key is a device's name without the words of _NOISE.
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
# Words that do not change the speed: maker, family, size and kind of memory, and SXM or OAM, which the plain keys stand for.
_NOISE = re.compile(r"NVIDIA|AMD|INSTINCT|TESLA|GEFORCE|OAM|\d+GB|HBM3E?|SXM\d?")


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak dense FLOP/s in bfloat16 or float16 of what torch.cuda.get_device_name() calls `device_name`.

    None for any other dtype, for the CPU, and for every name with an unknown word (a MIG slice, a laptop's chip, a new
    model): no MFU is better than a wrong one.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    words = [word for word in re.split(r"[\s\-]+", device_name.upper()) if not _NOISE.fullmatch(word)]
    return _PEAKS.get(" ".join(words))
