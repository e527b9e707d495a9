"""Validation loss on a fixed set of sequences, the same whatever the training did and however many ranks there are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn

from configs.schema import Config
from data.batches import IGNORE, validation_batches
from data.shards import TokenShards


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    loss_model: nn.Module,
    shards: TokenShards,
    context: int,
    config: Config,
    stopping: Callable[[], bool],
) -> float | None:
    """Mean cross-entropy in nats per token over `eval.sequences` sequences; None if `stopping` cut it short."""
    rank, world = accelerator.process_index, accelerator.num_processes
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)  # loss, targets
    loss_model.eval()
    batches = validation_batches(
        shards, context, config.eval.sequences, 1, rank, world, micro_batch_size=config.train.micro_batch_size
    )
    for inputs, targets in batches:
        if stopping():
            loss_model.train()
            return None
        loss = loss_model(inputs.to(accelerator.device), targets.to(accelerator.device))
        sums += torch.stack([loss.double(), (targets != IGNORE).sum().to(loss.device).double()])
    loss_model.train()
    loss_sum, count = accelerator.reduce(sums, "sum").tolist()
    return loss_sum / count
