"""Validation loss on a fixed set of sequences, the same whatever the training did and however many ranks there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from configs.schema import Config
from data import DataError
from data.batches import IGNORE, MicroBatch, validation_batches
from data.shards import TokenShards
from data.text_bytes import token_bytes
from data.tokenizer import load_tokenizer
from launch.distributed.strategy import Strategy


class Evaluation(NamedTuple):
    """What a model makes of some tokens."""

    loss: float  # mean cross-entropy, nats per token
    tokens: int  # targets
    bytes: int  # of the text that they stand for; 0: unknown

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that the text takes when the model predicts it, over its bytes in UTF-8; NaN where these are unknown."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan

    def record(self) -> dict[str, float]:
        """For metrics.jsonl."""
        record = {"val_loss": self.loss, "val_perplexity": self.perplexity}
        return record | ({"val_bits_per_byte": self.bits_per_byte} if self.bytes else {})

    def text(self) -> str:
        """For a person."""
        bits = f", {self.bits_per_byte:.4f} bits per byte" if self.bytes else ""
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.4g}{bits}"


def bytes_of_tokens(shards: TokenShards) -> Tensor:
    """Bytes (V,) of text that each token of the data's tokenizer stands for; all 0 where the tokenizer cannot tell."""
    try:
        return torch.from_numpy(token_bytes(load_tokenizer(shards.folder), shards.vocab_size, shards.eot_id))
    except Exception:  # what a tokenizer raises while it decodes is its own; the loss does not need it
        return torch.zeros(shards.vocab_size, dtype=torch.int64)


def add_up(
    loss: Callable[[Tensor, Tensor], Tensor], batches: Iterable[MicroBatch], lengths: Tensor, proceed: Callable[[], bool]
) -> list[float] | None:
    """The sums of loss (nats), targets and bytes of text over `batches`; None if `proceed`, asked before each, said no."""
    sums = torch.zeros(3, dtype=torch.float64)
    for inputs, targets in batches:
        if not proceed():
            return None
        counted = targets[targets != IGNORE]
        sums += torch.tensor([loss(inputs, targets).item(), counted.numel(), lengths[counted].sum()], dtype=torch.float64)
    return sums.tolist()


@torch.no_grad()
def evaluate(
    strategy: Strategy,
    shards: TokenShards,
    lengths: Tensor,
    context: int,
    config: Config,
    stopping: Callable[[], bool],
    mark: Callable[[str], None],
) -> Evaluation | None:
    """The model on `eval.sequences` sequences; None if it was stopped.

    Args:
        strategy: the model to evaluate.
        shards: the validation split.
        lengths: `bytes_of_tokens` of its tokenizer.
        context: tokens of a sequence, T.
        config: of the training run.
        stopping: asked before every batch whether to stop, on every rank alike.
        mark: the heartbeat's, called before every batch.
    """
    accelerator = strategy.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes

    def proceed() -> bool:
        mark("evaluation")
        return not stopping()

    batches = validation_batches(
        shards, context, config.eval.sequences, 1, rank, world, micro_batch_size=config.train.micro_batch_size
    )
    strategy.loss_model.eval()
    try:
        sums = add_up(strategy.loss, batches, lengths, proceed)
    finally:
        strategy.loss_model.train()
    if sums is None:
        return None
    return evaluation(*accelerator.reduce(torch.tensor(sums, dtype=torch.float64, device=accelerator.device), "sum").tolist())


def evaluation(loss: float, targets: float, length: float) -> Evaluation:
    """From the sums over all batches.

    Raises:
        DataError: not a single target.
    """
    if not targets:
        raise DataError("there is no token to evaluate on")
    return Evaluation(loss / targets, int(targets), int(length))
