"""A GPT-3 of this project as a stock GPT-2 of transformers, which computes the same function, and back."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from models.gpt3 import LAYER_NORM_EPS, GPT3Config, GPT3LMHeadModel

# What a GPT-2 must have so that a GPT-3 computes the same function. `gelu_pytorch_tanh` is `gelu_new` under another name.
OF_GPT3 = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (LAYER_NORM_EPS,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def to_gpt2(model: GPT3LMHeadModel) -> GPT2LMHeadModel:
    """A stock GPT-2 with the same function, as a copy: q, k, v fused, matrices transposed, as Conv1D stores (in, out)."""
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


def gpt3_config(config: GPT2Config, dropout: float) -> GPT3Config | None:
    """The configuration of the GPT-3 that computes the same function as the GPT-2 of `config`; None if there is none."""
    same = all(getattr(config, key) in values for key, values in OF_GPT3.items())
    if not same or config.n_inner not in (None, 4 * config.n_embd):
        return None
    return GPT3Config(
        vocab_size=config.vocab_size,
        layers=config.n_layer,
        width=config.n_embd,
        heads=config.n_head,
        context=config.n_positions,
        dropout=dropout,
        initializer_range=config.initializer_range,
        tie_word_embeddings=config.tie_word_embeddings,
    )


class Origin(NamedTuple):
    """Where a GPT-2 keeps a parameter of the GPT-3 with the same function."""

    name: str
    part: int | None = None  # of three along the last axis: q, k, v
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The parameter, from the tensor that holds it."""
        if self.part is not None:
            tensor = tensor.chunk(3, dim=-1)[self.part]  # (D, 3D) -> (D, D)
        return tensor.T if self.transposed else tensor  # (in, out) -> (out, in)


def origins(layers: int) -> dict[str, Origin]:
    """The origin of every parameter of a GPT-3."""
    found = {"lm_head.weight": Origin("lm_head.weight"), "model.embed_tokens.weight": Origin("transformer.wte.weight")}
    found["model.embed_positions.weight"] = Origin("transformer.wpe.weight")
    of_block = {
        "norm_1": ("ln_1", None), "norm_2": ("ln_2", None),
        "attn.q_proj": ("attn.c_attn", 0), "attn.k_proj": ("attn.c_attn", 1), "attn.v_proj": ("attn.c_attn", 2),
        "attn.o_proj": ("attn.c_proj", None), "mlp.up_proj": ("mlp.c_fc", None), "mlp.down_proj": ("mlp.c_proj", None),
    }  # fmt: skip
    for key in ("weight", "bias"):
        found[f"model.norm.{key}"] = Origin(f"transformer.ln_f.{key}")
        for i in range(layers):
            for name, (there, part) in of_block.items():
                transposed = key == "weight" and not name.startswith("norm")
                found[f"model.layers.{i}.{name}.{key}"] = Origin(f"transformer.h.{i}.{there}.{key}", part, transposed)
    return found


@torch.no_grad()
def from_gpt2(gpt2: GPT2LMHeadModel, config: GPT3Config) -> GPT3LMHeadModel:
    """A GPT-3 of `config` (see `gpt3_config`) with the same function, as a copy: the inverse of `to_gpt2`."""
    model = GPT3LMHeadModel(config).to(gpt2.dtype)
    where = origins(config.layers)
    for name, p in model.named_parameters():
        p.copy_(where[name].of(gpt2.get_parameter(where[name].name)))
    return model.train(gpt2.training)
