"""Models of transformers for the tests of routing, and which of their weights take the rule."""

import re

import torch
import transformers
from torch import nn

TOKENS = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
BASE = {**TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**BASE, "num_key_value_heads": 1, "intermediate_size": 40}
EXPERTS = {**GROUPED, "num_local_experts": 4, "intermediate_size": 24}
T = transformers


def gpt2(cls=T.GPT2LMHeadModel, **options) -> nn.Module:
    return cls(T.GPT2Config(**TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=32, **options))


def llama(**options) -> nn.Module:
    return T.LlamaForCausalLM(T.LlamaConfig(**GROUPED, **options))


def gpt_oss() -> nn.Module:
    layers = ["full_attention", "sliding_attention"]
    return T.GptOssForCausalLM(T.GptOssConfig(**EXPERTS, head_dim=8, layer_types=layers))


def vit(cls=T.ViTForImageClassification) -> nn.Module:
    sizes = {k: BASE[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    return cls(T.ViTConfig(**sizes, intermediate_size=40, image_size=16, patch_size=8, num_labels=5))


MODELS = {
    "gpt2": gpt2,
    "gpt2, untied": lambda: gpt2(tie_word_embeddings=False),
    "gpt2, cross-attention": lambda: gpt2(add_cross_attention=True),
    "gpt2, no head": lambda: gpt2(T.GPT2Model),
    "gpt2, classifier": lambda: gpt2(T.GPT2ForSequenceClassification, num_labels=16),
    "gpt_neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**BASE, intermediate_size=32)),
    "llama": llama,
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**GROUPED, head_dim=8, tie_word_embeddings=True)),
    "olmo2": lambda: T.Olmo2ForCausalLM(T.Olmo2Config(**GROUPED)),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**EXPERTS)),
    "gpt_oss": gpt_oss,
    "vit": vit,
    "vit, no head": lambda: vit(T.ViTModel),
}

GPT2_BLOCK = {
    "transformer.h.*.attn.c_attn.weight": (3, 16, 16),
    "transformer.h.*.attn.c_proj.weight": (1, 16, 16),
    "transformer.h.*.mlp.c_fc.weight": (1, 64, 16),
    "transformer.h.*.mlp.c_proj.weight": (1, 16, 64),
}
LLAMA_ATTENTION = {
    "model.layers.*.self_attn.q_proj.weight": (1, 16, 16),
    "model.layers.*.self_attn.k_proj.weight": (1, 8, 16),
    "model.layers.*.self_attn.v_proj.weight": (1, 8, 16),
    "model.layers.*.self_attn.o_proj.weight": (1, 16, 16),
}
LLAMA_BLOCK = LLAMA_ATTENTION | {
    "model.layers.*.mlp.gate_proj.weight": (1, 40, 16),
    "model.layers.*.mlp.up_proj.weight": (1, 40, 16),
    "model.layers.*.mlp.down_proj.weight": (1, 16, 40),
}
EXPERT_WEIGHTS = {
    "model.layers.*.mlp.experts.gate_up_proj": (8, 24, 16),
    "model.layers.*.mlp.experts.down_proj": (4, 16, 24),
}
VIT_BLOCK = {
    **{f"vit.layers.*.attention.{name}_proj.weight": (1, 16, 16) for name in "qkvo"},
    "vit.layers.*.mlp.fc1.weight": (1, 40, 16),
    "vit.layers.*.mlp.fc2.weight": (1, 16, 40),
}


def without(prefix: str, names: dict) -> dict:
    return {name.removeprefix(prefix): value for name, value in names.items()}


# What takes the rule, as (matrices, outputs, inputs); everything else takes AdamW.
BY_RULE = {
    "gpt2": GPT2_BLOCK,
    "gpt2, untied": GPT2_BLOCK,
    "gpt2, cross-attention": GPT2_BLOCK
    | {
        "transformer.h.*.crossattention.c_attn.weight": (2, 16, 16),
        "transformer.h.*.crossattention.q_attn.weight": (1, 16, 16),
        "transformer.h.*.crossattention.c_proj.weight": (1, 16, 16),
    },
    "gpt2, no head": without("transformer.", GPT2_BLOCK),
    "gpt2, classifier": GPT2_BLOCK,
    "gpt_neox": {
        "gpt_neox.layers.*.attention.query_key_value.weight": (3, 16, 16),
        "gpt_neox.layers.*.attention.dense.weight": (1, 16, 16),
        "gpt_neox.layers.*.mlp.dense_h_to_4h.weight": (1, 32, 16),
        "gpt_neox.layers.*.mlp.dense_4h_to_h.weight": (1, 16, 32),
    },
    "llama": LLAMA_BLOCK,
    "qwen3": LLAMA_BLOCK,
    "olmo2": LLAMA_BLOCK,
    "mixtral": LLAMA_ATTENTION | EXPERT_WEIGHTS | {"model.layers.*.mlp.gate.weight": (1, 4, 16)},
    "gpt_oss": LLAMA_ATTENTION | EXPERT_WEIGHTS | {"model.layers.*.mlp.router.weight": (1, 4, 16)},
    "vit": VIT_BLOCK,
    "vit, no head": without("vit.", VIT_BLOCK) | {"pooler.dense.weight": (1, 16, 16)},
}

# Weights of more than one axis that take AdamW with decay: embeddings, positions, the output layer.
BOUNDARY = {
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
    "gpt2, untied": {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"},
    "gpt2, cross-attention": {"transformer.wte.weight", "transformer.wpe.weight"},
    "gpt2, no head": {"wte.weight", "wpe.weight"},
    "gpt2, classifier": {"transformer.wte.weight", "transformer.wpe.weight", "score.weight"},
    "gpt_neox": {"gpt_neox.embed_in.weight", "lm_head.weight"},
    "llama": {"model.embed_tokens.weight", "lm_head.weight"},
    "qwen3": {"model.embed_tokens.weight"},
    "olmo2": {"model.embed_tokens.weight", "lm_head.weight"},
    "mixtral": {"model.embed_tokens.weight", "lm_head.weight"},
    "gpt_oss": {"model.embed_tokens.weight", "lm_head.weight"},
    "vit": {"vit.embeddings.position_embeddings", "vit.embeddings.patch_embeddings.projection.weight", "classifier.weight"},
    "vit, no head": {"embeddings.position_embeddings", "embeddings.patch_embeddings.projection.weight"},
}


def by_name(groups: list[dict]) -> dict[str, tuple[torch.Tensor, dict]]:
    """Every grouped parameter, with its group, under its name; a name that appears twice is an error."""
    names = [name for group in groups for name in group["param_names"]]
    assert len(names) == len(set(names))
    return {name: (p, group) for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)}


def star(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def stacked(p: torch.Tensor, group: dict) -> tuple[int, ...]:
    return group["matrices"][2] if group["matrices"] else (1, *p.shape) if p.ndim == 2 else tuple(p.shape)


def update_of(groups: list[dict]) -> dict[str, str]:
    return {name: group["update"] for name, (_, group) in by_name(groups).items()}


# --- models of transformers -------------------------------------------------------------------------------------------------
