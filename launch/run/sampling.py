"""Generates text from a model: a prompt and its continuation."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from data.tokenizer import vocabulary_size
from models.build import ModelError, one_line


class Drawing(NamedTuple):
    """How the next token is drawn from the model's distribution."""

    temperature: float = 0.7  # 0: always the most likely token
    top_k: int = 50  # draw from this number of the most likely tokens; 0: from all
    top_p: float = 1.0  # draw from the most likely tokens that together have this probability


class Until(StoppingCriteria):
    """Ends a sample early, when `stopping()` is True."""

    def __init__(self, stopping: Callable[[], bool]) -> None:
        self.stopping = stopping

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self.stopping(), dtype=torch.bool, device=input_ids.device)


class NamedTokens(LogitsProcessor):
    """Drops the vocabulary rows after the last token. An exported model has no such rows, and so draws the same text."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, V) -> (B, tokens)
        return scores[:, : self.tokens]


def after(seconds: float, stopping: Callable[[], bool] = lambda: False) -> Callable[[], bool]:
    """Return a function that is True once `seconds` have passed from now, or when `stopping()` is."""
    end = time.monotonic() + seconds
    return lambda: stopping() or time.monotonic() > end


@torch.no_grad()
def sample_text(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    end: int,
    context: int,
    prompt: str,
    length: int,
    seed: int,
    drawing: Drawing = Drawing(),  # noqa: B008
    stop_at_end: bool = False,
    stopping: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = lambda text: None,
) -> str:
    """Return `prompt` continued by `length` tokens, or by fewer if the model's context ends before.

    The same seed gives the same text. The model may be in training: its mode is restored.

    Args:
        end: the token that ends a document. An empty prompt is replaced by it; the returned text does not contain it.
        context: tokens that the model can see, T. If the prompt has T tokens or more, the model sees its last T / 2.
        stop_at_end: whether the text ends where the model ends the document.
        stopping: asked after each token whether to end the text early.
        note: called with warnings for the user.
    """
    # In a process whose locale is not UTF-8, command line arguments hold the bytes of other characters as surrogates.
    text = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    ids = tokenizer.encode(text, add_special_tokens=False).ids or [end]
    unseen: list[int] = []
    if len(ids) >= context:
        kept = max(1, context // 2)
        note(f"warning: the prompt has {len(ids)} tokens, the model's context {context}: the model sees its last {kept} tokens")
        unseen, ids = ids[:-kept], ids[-kept:]
    new = min(length, context - len(ids))
    if new < 1:
        return text
    draws: dict[str, Any] = {"do_sample": drawing.temperature > 0}
    if drawing.temperature > 0:
        draws |= {"temperature": drawing.temperature, "top_k": drawing.top_k, "top_p": drawing.top_p}
    options = GenerationConfig(max_new_tokens=new, eos_token_id=end if stop_at_end else None, pad_token_id=end, **draws)
    inputs = torch.tensor([ids], device=model.device)
    training, own, padding = model.training, model.generation_config, getattr(model.config, "pad_token_id", None)
    model.eval()
    model.config.pad_token_id = None  # else transformers warns that a prompt of only this token looks like padding
    model.generation_config = options  # else options that are unset here come from the model's own configuration
    torch.manual_seed(seed)
    try:
        with torch.compiler.set_stance("force_eager"):  # else each sequence length would be compiled
            tokens = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=options,
                logits_processor=LogitsProcessorList([NamedTokens(vocabulary_size(tokenizer))]),
                stopping_criteria=StoppingCriteriaList([Until(stopping)]),
            )
    except (ValueError, TypeError, IndexError) as error:  # some configurations can be trained but not sampled from
        raise ModelError(f"{type(model).__name__} cannot continue a text: {one_line(error)}") from error
    finally:
        model.generation_config, model.config.pad_token_id = own, padding
        model.train(training)
    return tokenizer.decode([token for token in [*unseen, *tokens[0].tolist()] if token != end])
