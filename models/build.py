"""A model from a configuration: a GPT-3 by name or by numbers, or any causal language model of transformers."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from models.gpt3 import GPT3Config
from models.sizes import SIZES

# transformers accepts these of any configuration without listing them: the old spelling of `rope_parameters`.
ROPE_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class ModelError(ValueError):
    """A model that cannot be built from what the user asked for. The message is one line."""


def build_model(
    *,
    size: str | None = None,
    layers: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    context: int | None = None,
    vocab_size: int,
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
    hf: dict | None = None,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """A freshly initialized causal language model, in training mode; its weights follow from torch.manual_seed.

    Either a GPT-3: `size` names one of `models.sizes.SIZES`, and `layers`, `width`, `heads`, `context` (tokens)
    override its numbers, or are all given without it; `dropout` is a probability. Or any model of transformers, without
    the network: `hf` is {"model_type": "qwen3", and any keys of that model's configuration}. In `hf`, `vocab_size` is
    filled in unless given, and special token ids are None unless given: the defaults belong to somebody else's
    tokenizer, and a padding id would freeze that token's embedding.

    `device`: where the parameters are made; "meta" makes shapes without memory. (Random numbers differ between kinds of
    device.) Raises ModelError for everything that a user can get wrong.
    """
    _require_count("vocab_size", vocab_size)
    shape = {"layers": layers, "width": width, "heads": heads, "context": context}
    shape = {name: value for name, value in shape.items() if value is not None}
    if hf is None:
        config = _gpt3_config(size, shape, vocab_size, dropout)
    else:
        of_gpt3 = [*(["size"] if size is not None else []), *shape, *(["dropout"] if dropout else [])]
        if of_gpt3:
            raise ModelError(f"hf and {', '.join(of_gpt3)} exclude each other: write the model's own keys into hf")
        config = _hf_config(hf, vocab_size)
    return prepare_model(model_of(config, device), gradient_checkpointing)


def model_of(config: PretrainedConfig, device: str | torch.device | None = None) -> PreTrainedModel:
    """A freshly initialized causal language model of a configuration of transformers."""
    with torch.device(device) if device is not None else nullcontext(), _model_errors(config.model_type):
        return AutoModelForCausalLM.from_config(config)


def prepare_model(model: PreTrainedModel, gradient_checkpointing: bool) -> PreTrainedModel:
    """`model` in training mode, with gradient checkpointing if asked for."""
    if gradient_checkpointing:
        _checkpoint_activations(model)
    return model.train()


def _gpt3_config(size: str | None, shape: dict, vocab_size: int, dropout: float) -> GPT3Config:
    if size is not None:
        if size not in SIZES:
            raise ModelError(f"unknown size {size!r}{_nearest(size, SIZES)}; sizes are {', '.join(SIZES)}")
        shape = {**vars(SIZES[size]), **shape}
    missing = [name for name in ("layers", "width", "heads", "context") if name not in shape]
    if missing:
        raise ModelError(f"give a size, or all of layers, width, heads, context: {', '.join(missing)} missing")
    for name, value in shape.items():
        _require_count(name, value)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ModelError(f"dropout must be a probability, 0 <= dropout < 1, got {dropout!r}")
    try:
        return GPT3Config(vocab_size=vocab_size, dropout=float(dropout), **shape)
    except ValueError as error:  # heads that do not divide the width
        raise ModelError(str(error)) from None


def _hf_config(hf: dict, vocab_size: int) -> PretrainedConfig:
    keys = dict(hf)
    model_type = keys.pop("model_type", None)
    if model_type is None:
        raise ModelError('hf needs a model_type, such as {"model_type": "qwen3"}')
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = _nearest(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise ModelError(f"transformers has no causal language model of model_type {model_type!r}{near}")
    with _model_errors(model_type):
        default = AutoConfig.for_model(model_type)
    if "vocab_size" not in default.to_dict():
        text = f"{model_type}_text"
        hint = f"; did you mean {text!r}?" if text in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else ""
        raise ModelError(f"{model_type!r} is a composite, whose vocabulary belongs to its text model{hint}")
    known = {*default.to_dict(), *default.attribute_map, "attn_implementation"} - {"model_type", "transformers_version"}
    known |= ROPE_KEYS if hasattr(default, "rope_parameters") else set()
    for key in keys:
        if key not in known:
            raise ModelError(f"{model_type} has no configuration key {key!r}{_nearest(key, known)}")
    keys.setdefault("vocab_size", vocab_size)
    _require_count("vocab_size", keys["vocab_size"])
    if keys["vocab_size"] < vocab_size:
        raise ModelError(f"hf.vocab_size {keys['vocab_size']} is smaller than the tokenizer's {vocab_size}")
    for name in SPECIAL_TOKENS:
        keys.setdefault(name, None)
    with _model_errors(model_type):
        return type(default)(**keys)


@contextmanager
def _model_errors(model_type: str) -> Iterator[None]:
    """ModelError for whatever transformers raises when it makes a configuration, or a model of numbers that do not fit."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelError(f"{model_type}: {' '.join(str(error).split()) or type(error).__name__}") from error


def positions(model: PreTrainedModel) -> int | None:
    """The longest sequence, in tokens, that the model's configuration allows; None if it names no limit."""
    config = model.config.get_text_config()
    found = (getattr(config, name, None) for name in POSITIONS)
    return next((value for value in found if isinstance(value, int)), None)


def _checkpoint_activations(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise ModelError(f"{type(model).__name__} does not support gradient_checkpointing")
    # transformers 5.23 renamed the method.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _require_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{name} must be a positive integer, got {value!r}")


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.75)
    return f"; did you mean {near[0]!r}?" if near else ""
