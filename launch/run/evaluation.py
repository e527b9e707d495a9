"""Validation loss on a fixed set of sequences, the same whatever the training did and however many ranks there are."""

from __future__ import annotations

from collections.abc import Callable

import torch

from configs.schema import Config
from data.batches import IGNORE, validation_batches
from data.shards import TokenShards
from launch.distributed.strategy import Strategy


@torch.no_grad()
def evaluate(
    strategy: Strategy,
    shards: TokenShards,
    context: int,
    config: Config,
    stopping: Callable[[], bool],
    mark: Callable[[str], None],
) -> float | None:
    """Mean cross-entropy in nats per token over `eval.sequences` sequences; None if it was stopped.

    Args:
        strategy: the model to evaluate.
        shards: the validation split.
        context: tokens of a sequence, T.
        config: of the training run.
        stopping: asked before every batch whether to stop, on every rank alike.
        mark: the heartbeat's, called before every batch.
    """
    accelerator = strategy.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)  # loss, targets
    strategy.loss_model.eval()
    batches = validation_batches(
        shards, context, config.eval.sequences, 1, rank, world, micro_batch_size=config.train.micro_batch_size
    )
    for inputs, targets in batches:
        mark("evaluation")
        if stopping():
            strategy.loss_model.train()
            return None
        loss = strategy.loss(inputs, targets)
        sums += torch.stack([loss.double(), (targets != IGNORE).sum().to(loss.device).double()])
    strategy.loss_model.train()
    loss_sum, count = accelerator.reduce(sums, "sum").tolist()
    return loss_sum / count
