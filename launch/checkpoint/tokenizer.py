"""The tokenizer of an exported model, and what the configurations say of special tokens and of the context.

Exported text is cut into the tokens that training saw: no BOS before it, the end of text after a document. So generation stops
at the end of text, and starts with it where there is no prompt.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from data import DataError
from data.special_tokens import as_trained, declared_tokens, end_of_text, tokenizer_config
from launch.checkpoint.load import read_state
from launch.checkpoint.verify import CheckpointError
from models import longest_context


def export_tokenizer(run: Path, model: PreTrainedModel, context: int | None) -> PreTrainedTokenizerFast:
    """The tokenizer of the training run in `run`, for `model`, whose configurations get its special tokens and the context.

    Raises:
        CheckpointError: a tokenizer that is missing, cannot be read, or does not fit the model.
    """
    path = run / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"the run has no {path}")
    try:
        tok = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    try:
        declared = declared_tokens(run)
        end = end_of_text(tok, declared)
    except DataError as error:
        raise CheckpointError(f"{path}: {error}") from error
    tok = as_trained(tok, end)  # runs of former versions have the tokenizer as it was given
    special = tokenizer_config(tok, end, declared)
    del special["tokenizer_class"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tok, model_max_length=context, **special)
    if len(tokenizer) > model.config.vocab_size:
        raise CheckpointError(f"{path} has {len(tokenizer)} tokens, the model only {model.config.vocab_size}")
    _configure(model, tokenizer, context)
    return tokenizer


def trained_context(checkpoint: Path, config: PretrainedConfig) -> int | None:
    """Tokens of a training sequence: the run's own, which may be fewer than the model has positions for."""
    try:
        asked = read_state(checkpoint)["config"]["model"]["context"]
    except (OSError, ValueError, KeyError):
        asked = None
    return asked or longest_context(config)


def _configure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, context: int | None) -> None:
    """Write special tokens and context into the model's and the generation configuration."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.config.bos_token_id = model.config.eos_token_id = end
    if pad != end or not _has_padding_row(model.config, pad):
        model.config.pad_token_id = pad
    # A pipeline, which asks for 256 new tokens, stays inside a small context.
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=pad, max_length=context)
    longest = getattr(model.config, "max_position_embeddings", None)
    if context and longest and longest > context and _same_with(model, context):
        model.config.max_position_embeddings = context


def _has_padding_row(config: PretrainedConfig, pad: int) -> bool:
    """Whether a model of `config` would never train the embedding of its padding, here the end of text."""
    return getattr(_shapes(config, pad_token_id=pad).get_input_embeddings(), "padding_idx", None) is not None


def _same_with(model: PreTrainedModel, context: int) -> bool:
    """Whether fewer positions leave the function as it is: no weight has another shape, and rotary angles do not scale."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type", "default") for part in (rope, *rope.values()) if isinstance(part, dict)}
    shapes = {name: weight.shape for name, weight in _shapes(model.config, max_position_embeddings=context).state_dict().items()}
    return kinds <= {"default"} and shapes == {name: weight.shape for name, weight in model.state_dict().items()}


def _shapes(config: PretrainedConfig, **changes: int) -> PreTrainedModel:
    """The model of a changed configuration, without memory for its weights."""
    changed = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(changed, name, value)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(changed)
