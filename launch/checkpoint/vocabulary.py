"""Cuts the embedding and the output layer of an exported model to one row for each token.

Training rounds the number of rows up to a multiple, which is faster on GPUs. Other tools compare this number with the
tokenizer's. The additional rows after the last token are never an input, and as an output they stand for no text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from launch.checkpoint.verify import CheckpointError
from launch.distributed.buffers import persistent_buffers

CHECKED = 12  # length of the token sequence on which both models must agree


def one_row_a_token(model: PreTrainedModel, tokens: int, note: Callable[[str], None]) -> PreTrainedModel:
    """Return `model` without the rows after the last of the tokenizer's `tokens` tokens; a padding token's row is kept, too.

    The remaining weights keep their bits. So logits change only by the rounding of a matrix product of another size. If the
    model cannot be cut, it keeps its rows, and `note` is called with the reason.

    Raises:
        CheckpointError: the model has fewer rows than the tokenizer has tokens.
    """
    text = model.config.get_text_config()
    if tokens > text.vocab_size:
        raise CheckpointError(f"the run's tokenizer has {tokens} tokens, the model only {text.vocab_size}")
    padding = getattr(text, "pad_token_id", None)
    wanted = tokens if padding is None else max(tokens, padding + 1)
    if wanted >= text.vocab_size:
        return model
    try:
        return cut(model, wanted)
    except Exception as error:  # architectures raise many types of errors for a size that they do not support
        reason = " ".join(str(error).split())[:200]
        note(f"the model keeps {text.vocab_size - tokens} rows behind those of its tokens: {reason}")
        return model


@torch.no_grad()
def cut(model: PreTrainedModel, size: int) -> PreTrainedModel:
    """Return a copy of `model` for the first `size` tokens. Raises ValueError if its logits for them differ."""
    config = copy.deepcopy(model.config)
    rows, config.get_text_config().vocab_size = config.get_text_config().vocab_size, size
    smaller = AutoModelForCausalLM.from_config(config).eval()
    theirs, own = (dict(m.named_parameters()) | persistent_buffers(m) for m in (model, smaller))
    for name, tensor in own.items():
        tensor.data = first_rows(theirs[name], tensor.shape, rows, size)
    tokens = torch.linspace(0, size - 1, CHECKED).long()[None]  # (1, T), the first token and the last among them
    expected, logits = (m(tokens, use_cache=False).logits.float() for m in (model, smaller))
    # For 181 of 184 model types the bits are equal. A matrix product of another size may round differently.
    if not torch.allclose(logits, expected[..., :size], rtol=1e-4, atol=1e-4, equal_nan=True):
        raise ValueError(f"with fewer rows a {config.model_type} is another function")
    return smaller


def first_rows(weight: Tensor, shape: torch.Size, rows: int, size: int) -> Tensor:
    """Return `weight` cut from `rows` to `size` in the dimensions where `shape` asks for it.

    Raises ValueError if `weight` differs from `shape` in another way.
    """
    pairs = list(zip(weight.shape, shape, strict=True))
    if any(pair != (rows, size) and pair[0] != pair[1] for pair in pairs):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} would get the shape {tuple(shape)}")
    return weight if weight.shape == shape else weight[tuple(slice(n) for n in shape)].clone()
