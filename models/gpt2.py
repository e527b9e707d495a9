"""A GPT-3 of this project as a stock GPT-2 of transformers, which computes the same function."""

from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from models.gpt3 import LAYER_NORM_EPS, GPT3LMHeadModel


def to_gpt2(model: GPT3LMHeadModel) -> GPT2LMHeadModel:
    """The same function as a stock GPT-2, a copy: q, k, v fused, matrices transposed, as Conv1D stores (in, out)."""
    config = model.config
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context,
            n_ctx=config.context,  # transformers reads n_positions alone, other tools also this
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            activation_function="gelu_new",
            layer_norm_epsilon=LAYER_NORM_EPS,
            initializer_range=config.initializer_range,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    ).to(model.dtype)
    modules: dict[str, Any] = {
        "transformer.wte": model.model.embed_tokens,
        "transformer.wpe": model.model.embed_positions,
        "transformer.ln_f": model.model.norm,
        "lm_head": model.lm_head,
    }
    weights: dict[str, Tensor] = {}
    block: Any
    for i, block in enumerate(model.model.layers):
        h = f"transformer.h.{i}"
        modules |= {f"{h}.ln_1": block.norm_1, f"{h}.ln_2": block.norm_2}
        qkv = (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj)
        weights[f"{h}.attn.c_attn.weight"] = torch.cat([proj.weight.T for proj in qkv], dim=1)  # 3 x (D, D) -> (D, 3D)
        weights[f"{h}.attn.c_attn.bias"] = torch.cat([proj.bias for proj in qkv])  # (3D,)
        for name, linear in (
            ("attn.c_proj", block.attn.o_proj),
            ("mlp.c_fc", block.mlp.up_proj),
            ("mlp.c_proj", block.mlp.down_proj),
        ):
            weights[f"{h}.{name}.weight"] = linear.weight.T  # (out, in) -> (in, out)
            weights[f"{h}.{name}.bias"] = linear.bias
    for name, module in modules.items():
        weights |= {f"{name}.{key}": value for key, value in module.named_parameters()}
    gpt2.load_state_dict(weights)
    return gpt2.train(model.training)
