"""Writes the tokenizer of an exported model, and the special tokens and the context into its configurations.

An exported tokenizer cuts text into the tokens that training saw: no BOS before a text, and the end of text after a document. So
generation stops at the end of text, and starts with it if there is no prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from data.special_tokens import as_trained, declared_tokens, tokenizer_config
from launch.checkpoint.state import read_state
from launch.checkpoint.trained import end_of_run
from launch.checkpoint.verify import CheckpointError
from models import longest_context

PIPELINE = 256  # tokens that pipeline("text-generation") of transformers writes by default


def export_tokenizer(
    run: Path, context: int | None, data: Mapping[str, Any], note: Callable[[str], None]
) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the training run in `run`, for texts of `context` tokens.

    Args:
        data: the section `data` of the run's configuration.
        note: called with a line if the end of text is a guess.

    Raises:
        CheckpointError: the tokenizer is missing or cannot be read, or has no end of text.
    """
    path = run / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"the run has no {path}")
    try:
        tok = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    end_id, guess = end_of_run(tok, run, data)
    if guess:
        note(guess)
    end, declared = tok.id_to_token(end_id), declared_tokens(run)
    assert end is not None
    tok = as_trained(tok, end)  # runs of earlier versions stored the tokenizer unchanged
    special = tokenizer_config(tok, end, declared)
    del special["tokenizer_class"]
    special.setdefault("unk_token", end)  # as in GPT-2, which never writes it either; CTranslate2 needs one
    return PreTrainedTokenizerFast(tokenizer_object=tok, model_max_length=context, **special)


def trained_context(checkpoint: Path, config: PretrainedConfig) -> int | None:
    """Return the tokens of a training sequence: the run's context, which may be less than the model's positions."""
    try:
        asked = read_state(checkpoint)["config"]["model"]["context"]
    except (OSError, ValueError, KeyError):
        asked = None
    return asked or longest_context(config)


def trained_data(checkpoint: Path) -> dict[str, Any]:
    """Return the section `data` of the run's configuration; an empty one if state.json cannot be read."""
    try:
        return dict(read_state(checkpoint)["config"]["data"])
    except (OSError, ValueError, KeyError):
        return {}


def configure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, context: int | None) -> None:
    """Write special tokens and context into the model's configuration and its generation configuration.

    A padding token of the trained model is kept, because some architectures count positions from it.
    """
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.config.bos_token_id = model.config.eos_token_id = end
    own = getattr(model.config, "pad_token_id", None)
    if own is None and _may_be_padding(model.config, pad, end):
        model.config.pad_token_id = pad
    # A pipeline asks for 256 new tokens, which would exceed a small context. A large context gets no limit, because transformers
    # 5 warns about the limit whenever `generate` gets max_new_tokens.
    limit = context if context and context < 2 * PIPELINE else None
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=pad, max_length=limit)
    longest = getattr(model.config, "max_position_embeddings", None)
    if context and longest and longest > context and _same_with(model, context):
        model.config.max_position_embeddings = context


def _may_be_padding(config: PretrainedConfig, pad: int, end: int) -> bool:
    """Return whether setting `pad` keeps the model's function, and keeps the embedding of the end of text trainable."""
    try:
        model = _shapes(config, pad_token_id=pad)
    except Exception:  # XGLM uses the number of the padding token as a position
        return False
    embedding = model.get_input_embeddings()
    others = [m for m in model.modules() if m is not embedding and not isinstance(m, PreTrainedModel)]
    if any(getattr(m, "padding_idx", None) is not None for m in others):  # positions are counted from it
        return False
    return pad != end or getattr(embedding, "padding_idx", None) is None


def _same_with(model: PreTrainedModel, context: int) -> bool:
    """Return whether fewer positions keep the function: no weight changes its shape, and rotary angles are not scaled."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type", "default") for part in (rope, *rope.values()) if isinstance(part, dict)}
    shapes = {name: weight.shape for name, weight in _shapes(model.config, max_position_embeddings=context).state_dict().items()}
    return kinds <= {"default"} and shapes == {name: weight.shape for name, weight in model.state_dict().items()}


def _shapes(config: PretrainedConfig, **changes: int) -> PreTrainedModel:
    """Return the model of a changed configuration, without memory for its weights."""
    changed = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(changed, name, value)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(changed)
