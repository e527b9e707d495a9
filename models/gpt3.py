"""GPT-3 (arXiv 2005.14165) as a transformers model: the GPT-2 decoder, with q, k, v and o as separate matrices.

They are separate so that an optimizer for matrices sees the four maps that the mathematics has. It departs from the
paper once: attention is dense in every layer, where the paper alternates dense and locally banded layers.
`models.export` writes the same function as a stock GPT-2.

Read it from the bottom: GPT3LMHeadModel is GPT3Model and the output projection; GPT3Model is embeddings, `layers` times
GPT3Block, and a LayerNorm; GPT3Block adds Attention and MLP to the residual stream.

Shapes: B batch, T time (tokens of this call), S keys (tokens in the cache + T), D width, H heads, K = D / H, V vocabulary.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PretrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

LAYER_NORM_EPS = 1e-5


class GPT3Config(PretrainedConfig):
    """The shape of a GPT-3: `vocab_size`, `layers`, `width`, `heads`, `context` (tokens), `dropout` (0 <= p < 1).

    The feed-forward layer is 4 x width, as in every published size. The names that transformers uses elsewhere
    (`hidden_size`, `num_hidden_layers`, ...) are the same values. ValueError for a value that is no size, and for heads that do
    not divide the width.
    """

    model_type = "gpt3"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "max_position_embeddings": "context",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 50257
    layers: int = 12
    width: int = 768
    heads: int = 12
    context: int = 2048
    dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for key in ("vocab_size", "layers", "width", "heads", "context"):
            if type(getattr(self, key)) is not int or not 0 < getattr(self, key) < 1 << 31:
                raise ValueError(f"{key} is {getattr(self, key)!r}, expected a number of at least 1")
        for key in ("tie_word_embeddings", "use_cache", "is_encoder_decoder"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key} is {getattr(self, key)!r}, expected true or false")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}, expected a number in [0, 1)")
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width {self.width}")


class ResidualLinear(nn.Linear):
    """A linear map whose output is added to the residual stream; it is initialized smaller."""


class Attention(nn.Module):
    """Causal self-attention with H heads: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: GPT3Config, layer: int):
        super().__init__()
        D = config.width
        self.layer, self.heads, self.dropout = layer, config.heads, config.dropout
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.o_proj = ResidualLinear(D, D)

    def forward(self, x: Tensor, mask: Tensor | None, past_key_values: Cache | None) -> Tensor:
        B, T, D = x.shape
        heads = (B, T, self.heads, D // self.heads)  # (B, T, H, K)
        q = self.q_proj(x).view(heads).transpose(1, 2)  # (B, T, D) -> (B, T, H, K) -> (B, H, T, K)
        k = self.k_proj(x).view(heads).transpose(1, 2)  # (B, H, T, K)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # (B, H, T, K)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer)  # (B, H, S, K)
        dropout = self.dropout if self.training else 0.0
        causal = mask is None and T > 1  # without a mask either T = S, or T = 1 and the one new token sees all S
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)  # (B, H, T, K)
        y = y.transpose(1, 2).reshape(B, T, D)  # (B, H, T, K) -> (B, T, H, K) -> (B, T, D)
        return self.o_proj(y)


class MLP(nn.Module):
    """The feed-forward layer, four times as wide inside: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: GPT3Config):
        super().__init__()
        self.up_proj = nn.Linear(config.width, 4 * config.width)
        self.down_proj = ResidualLinear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))  # (B, T, D) -> (B, T, 4D) -> (B, T, D)


class GPT3Block(GradientCheckpointingLayer):
    """One layer: x + Attention(LayerNorm(x)), then x + MLP(LayerNorm(x))."""

    def __init__(self, config: GPT3Config, layer: int):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.attn = Attention(config, layer)
        self.norm_2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, past_key_values: Cache | None = None) -> Tensor:
        x = x + self.dropout(self.attn(self.norm_1(x), mask, past_key_values))  # (B, T, D)
        return x + self.dropout(self.mlp(self.norm_2(x)))  # (B, T, D)


class GPT3PreTrainedModel(PreTrainedModel):
    """What transformers asks of every model: its abilities, and how weights are initialized."""

    config: GPT3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["GPT3Block"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """N(0, 0.02), as in GPT-2: with 0.02 / sqrt(2 x layers) for the 2 x layers maps that add to the residual stream."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            if isinstance(module, ResidualLinear):
                std /= math.sqrt(2 * self.config.layers)
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class GPT3Model(GPT3PreTrainedModel):
    """The decoder without its output projection."""

    def __init__(self, config: GPT3Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.embed_positions = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(GPT3Block(config, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, T), or inputs_embeds (B, T, D) -> last_hidden_state (B, T, D), after the final LayerNorm.

        attention_mask (B, S): 0 marks padding; None, the fast path, means no padding. position_ids (B, T): by default they
        count from the first token of the cache, so left padding needs them (`generate` gives them). use_cache: by default
        False in training, else the configuration's. ValueError beyond `config.context`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        T, seen = x.shape[1], 0 if past_key_values is None else past_key_values.get_seq_length()
        # A static cache counts on the device, and comparing would wait for the device at every token. Its size bounds it.
        total = T + (seen if isinstance(seen, int) else 0)
        if total > self.config.context:
            raise ValueError(f"{total} tokens are more than the model's context of {self.config.context}")
        if position_ids is None:
            position_ids = (torch.arange(T, device=x.device) + seen).unsqueeze(0)  # (1, T)
        # Given position_ids, transformers would look for several documents packed in one row.
        mask = create_causal_mask(self.config, x, attention_mask, past_key_values)  # None or (B, 1, T, S)
        x = self.dropout(x + self.embed_positions(position_ids))  # (B, T, D)
        for block in self.layers:
            x = block(x, mask, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class GPT3LMHeadModel(GPT3PreTrainedModel, GenerationMixin):
    """The decoder and its output projection, tied to the token embedding unless the configuration says otherwise."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: GPT3Config):
        super().__init__(config)
        self.model = GPT3Model(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithPast:
        """As GPT3Model, but -> logits (B, T, V), or those of the last `logits_to_keep` positions (0: of all).

        labels (B, T) are the input_ids themselves, with -100 where no loss is wanted. They add `loss`, the float32 mean over
        t of -log p(labels[:, t + 1] | input_ids[:, :t + 1]). It needs all logits; training uses `models.loss` instead.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])  # (B, T, D) -> (B, T, V)
        loss = None
        if labels is not None:
            # (B, T - 1, V) -> (B (T - 1), V) and (B, T - 1) -> (B (T - 1),)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)


AutoConfig.register("gpt3", GPT3Config)
AutoModel.register(GPT3Config, GPT3Model)
AutoModelForCausalLM.register(GPT3Config, GPT3LMHeadModel)
