"""DDP: every rank holds the whole model. Gradients are averaged, and Celo2 divides the orthogonalization over the ranks."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from transformers import PreTrainedModel

from celo2.distributed.shard import local_shard_of
from configs.schema import Config
from launch.distributed.birth import fill_whole
from launch.distributed.strategy import Judge, ShardedParameter, Strategy, is_expert
from launch.monitoring.guard import Judged
from launch.optimizers.build import build_optimizer
from launch.private import ddp_keep_buckets
from models import CausalLMLoss, unused_parameters
from models.initialization import Weights


class DDP(Strategy):
    """`DistributedDataParallel`, or a single process."""

    def __init__(self, config: Config, accelerator: Accelerator, model: PreTrainedModel, weights: Weights) -> None:
        super().__init__(config, accelerator, model, weights)
        fill_whole(model, weights, self.device)
        loss = CausalLMLoss(model)
        if self.world > 1:
            unused = unused_parameters(loss)
            self.unused = {name for name, p in model.named_parameters() if p in unused}
        self.compile()
        self.looks_for_unused = bool(self.unused) or any(is_expert(name) for name, _ in model.named_parameters())
        # Gradients are views of the communication buckets; with several micro-batches, those before the last accumulate outside
        # of the buckets. In some architectures, weights never get a gradient (cross-attention without an encoder), or not in
        # every step (experts): then DDP must look for unused parameters.
        accelerator.ddp_handler = DistributedDataParallelKwargs(
            gradient_as_bucket_view=True,
            find_unused_parameters=self.looks_for_unused,
        )
        self.loss_model = accelerator.prepare_model(loss)
        replicas = dist.group.WORLD if self.world > 1 else None
        divided = config.distributed.shard_state
        self.optimizer = build_optimizer(config.optimizer, self.groups, replicas, divided, config.train.steps)
        self.shards = {name: ShardedParameter(p, local_shard_of(p)) for name, p in model.named_parameters()}

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """The context of one pass: gradients are reduced only in the last micro-batch, in the same buckets in every step."""
        if self.world > 1 and not self.looks_for_unused:  # if DDP looks for unused weights, it never rearranges its buckets
            ddp_keep_buckets(self.loss_model)
        return nullcontext() if last else self.accelerator.no_sync(self.loss_model)

    def update(self, judge: Judge) -> Judged:
        """Clip the gradient (a limit of 0 means no clipping), judge, update."""
        limit = self.config.train.grad_clip or math.inf
        judged = judge(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        if self.admit(judged):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return judged
