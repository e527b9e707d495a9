"""FSDP2: every rank holds some rows of every parameter; weights are gathered block by block while they are needed."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from celo2.distributed.shard import local_shard_of
from celo2.stack import is_dtensor, local
from configs.load import ConfigError
from configs.schema import Config
from launch.distributed.blocks import required_blocks
from launch.distributed.strategy import Judge, Strategy, sharded_parameters
from launch.monitoring.guard import Judged
from launch.optimizers.build import build_optimizer, optimizer_groups
from models import CausalLMLoss, one_line


class FSDP2(Strategy):
    """`fully_shard` on every block and on the loss module, which holds the rest.

    Under bf16, what autocast would round anyway, the weights of attention and feed-forward parts, travels in bfloat16, and its
    gradients in float32. Norms, embeddings and the residual stream stay in float32, as under autocast alone.
    """

    whole = False

    def __init__(self, config: Config, accelerator: Accelerator, model: PreTrainedModel) -> None:
        super().__init__(config, accelerator, model)
        self.copies = config.distributed.replicas
        if self.world % self.copies:
            raise ConfigError(f"distributed.replicas is {self.copies}, which does not divide {self.world} processes")
        if self.copies == 1:
            mesh = init_device_mesh(accelerator.device.type, (self.world,), mesh_dim_names=("shard",))
        else:
            shape = (self.copies, self.world // self.copies)
            mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=("replicate", "shard"))
        bf16 = config.train.precision == "bf16"
        halved = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in required_blocks(model):
            for part in block.children() if bf16 else ():
                if has(part, nn.Linear) and not has(part, nn.LayerNorm):
                    fully_shard(part, mesh=mesh, mp_policy=halved)
            fully_shard(block, mesh=mesh)
        self.loss_model = CausalLMLoss(model)
        fully_shard(self.loss_model, mesh=mesh)
        self.autocast = partial(torch.autocast, accelerator.device.type, torch.bfloat16, enabled=bf16)

        self.parameters = dict(model.named_parameters())
        groups = optimizer_groups(config.optimizer, model)
        for group in groups:
            group["params"] = [flat_local_shard(p) for p in group["params"]]
        self.optimizer = build_optimizer(config.optimizer, groups)
        self.shards = sharded_parameters(groups, self.parameters)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """As under DDP, where Accelerate adds the autocast."""
        with self.autocast():
            return super().loss(inputs, targets)

    def differentiate(self, loss: Tensor) -> None:
        """ConfigError for an architecture whose backward pass reads weights that are not gathered (Reformer)."""
        try:
            super().differentiate(loss)
        except RuntimeError as error:
            if "DTensor" not in str(error):
                raise
            name = type(self.model).__name__
            raise ConfigError(f"distributed.strategy fsdp2 cannot shard {name}: {one_line(error)}; ddp can train it") from error

    def update(self, judge: Judge) -> Judged:
        """Clip the gradient, judge, update the local shards."""
        norm: Any = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.train.grad_clip or math.inf)
        judged = judge(norm.full_tensor() if is_dtensor(norm) else norm)
        if self.admit(judged):
            for name, shard in self.shards.items():
                if (grad := self.parameters[name].grad) is not None:
                    shard.weight.grad = local(grad).reshape(-1)
            self.optimizer.step()
        self.optimizer.zero_grad()
        for p in self.parameters.values():
            p.grad = None
        return judged


def has(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module of `kind` is in `module`."""
    return any(isinstance(m, kind) for m in module.modules())


def flat_local_shard(p: Tensor) -> Tensor:
    """The local shard of a DTensor as a vector that shares its memory and says what it is."""
    flat: Any = local(p).detach().view(-1)
    flat.local_shard = local_shard_of(p)
    return flat
