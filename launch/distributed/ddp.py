"""DDP: every rank holds the whole model; gradients are averaged, and Celo2 divides the orthogonalization over the ranks."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from transformers import PreTrainedModel

from celo2.distributed.shard import LocalShard
from configs.schema import Config
from launch.distributed.strategy import Judge, Shard, Strategy
from launch.monitoring.guard import Verdict
from launch.optimizers.build import build_optimizer, optimizer_groups
from models import CausalLMLoss


class DDP(Strategy):
    """`DistributedDataParallel`, or one process."""

    def __init__(self, config: Config, accelerator: Accelerator, model: PreTrainedModel) -> None:
        super().__init__(config, accelerator, model)
        # Gradients once, as views of the buckets that travel.
        accelerator.ddp_handler = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        self.loss_model = accelerator.prepare_model(CausalLMLoss(model))
        replicas = dist.group.WORLD if self.world > 1 else None
        groups = optimizer_groups(config.optimizer, model)
        self.optimizer = build_optimizer(config.optimizer, groups, replicas, config.distributed.shard_state)
        self.shards = {n: Shard(p, LocalShard(tuple(p.shape), 0, p.numel()), []) for n, p in model.named_parameters()}

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Gradients travel in the last micro-batch of a step."""
        return nullcontext() if last else self.accelerator.no_sync(self.loss_model)

    def step(self, judge: Judge) -> Verdict:
        """Clip, judge, update."""
        verdict = judge(clip_(self.model, self.config.train.grad_clip))
        if verdict.healthy:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return verdict


def clip_(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradient to a norm of at most `limit` (0: leave it); returns the norm it had."""
    return nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
