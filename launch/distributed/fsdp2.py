"""FSDP2: every rank holds some rows of every parameter. Weights are gathered block by block while they are needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from celo2.distributed.shard import local_shard_of
from celo2.stack import is_dtensor, local
from configs.load import ConfigError
from configs.schema import Config
from launch.distributed.birth import fill
from launch.distributed.blocks import required_blocks
from launch.distributed.strategy import Judge, Strategy, sharded_parameters
from launch.monitoring.guard import Judged
from launch.optimizers.build import build_optimizer
from models import CausalLMLoss, one_line
from models.initialization import Weights
from models.loss import few_tokens, uses_all_parameters

LINEAR = (nn.Linear, Conv1D)


class FSDP2(Strategy):
    """`fully_shard` on every block and on the loss module, which holds all other parameters.

    Under bf16, the weights of linear layers in attention and feed-forward parts are gathered in bfloat16, since autocast would
    round them anyway; their gradients are reduced in float32. Norms of any kind, embeddings, parameters of other modules, and
    the residual stream stay in float32, as under autocast alone.
    """

    whole = False

    def __init__(self, config: Config, accelerator: Accelerator, model: PreTrainedModel, weights: Weights) -> None:
        super().__init__(config, accelerator, model, weights)
        self.copies = config.distributed.replicas
        if self.world % self.copies:
            raise ConfigError(f"distributed.replicas is {self.copies}, which does not divide {self.world} processes")
        if self.copies == 1:
            mesh = init_device_mesh(accelerator.device.type, (self.world,), mesh_dim_names=("shard",))
        else:
            shape = (self.copies, self.world // self.copies)
            mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=("replicate", "shard"))
            self.copies_group = mesh.get_group("replicate")
        bf16 = config.train.precision == "bf16"
        self.offloaded = config.distributed.offload
        # Pinned memory lets copies to and from a GPU overlap with its computation.
        offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if self.offloaded else OffloadPolicy()
        shard = partial(fully_shard, mesh=mesh, offload_policy=offload)
        halved = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in required_blocks(model):
            for part in parts_of(block) if bf16 else ():
                if is_halved(part):
                    for norm in norms_in(part):
                        shard(norm)
                    shard(part, mp_policy=halved)
            shard(block)
        self.loss_model = CausalLMLoss(model)
        shard(self.loss_model)
        allocate(self.loss_model, torch.device("cpu") if self.offloaded else self.device)
        for name, p in model.named_parameters():
            fill(local(p), weights, name, local_shard_of(p).start)
        self.autocast = partial(torch.autocast, accelerator.device.type, torch.bfloat16, enabled=bf16)

        self.parameters = dict(model.named_parameters())
        if self.world > 1:
            self.unused = self.find_unused()
        self.compile()
        for group in self.groups:
            group["params"] = [flat_local_shard(self.parameters[name]) for name in group["param_names"]]
        self.optimizer = build_optimizer(config.optimizer, self.groups)
        self.shards = sharded_parameters(self.groups, self.parameters)

    def find_unused(self) -> set[str]:
        """Return the parameters that get no gradient from the loss of a few tokens. Every rank must call it.

        Each gradient is freed as soon as it is computed.
        """
        if uses_all_parameters(self.model):
            return set()
        unused = set(self.parameters)

        def came(p: Tensor, name: str) -> None:
            unused.discard(name)
            p.grad = None

        hooks = [p.register_post_accumulate_grad_hook(partial(came, name=name)) for name, p in self.parameters.items()]
        self.loss_model.eval()
        tokens = few_tokens(self.model, torch.Generator(self.device).manual_seed(0))
        self.differentiate(self.loss(tokens[:, :-1], tokens[:, 1:]))
        self.loss_model.train()
        for hook in hooks:
            hook.remove()
        return unused

    def loss(self, inputs: Tensor, targets: Tensor, **options: bool) -> Tensor:
        """Compute the loss under autocast, which Accelerate adds under DDP."""
        with self.autocast():
            return super().loss(inputs, targets, **options)

    def differentiate(self, loss: Tensor) -> None:
        """Add the gradient of `loss`. Raises ConfigError if the backward pass reads weights that are not gathered (Reformer)."""
        try:
            super().differentiate(loss)
        except RuntimeError as error:
            if "DTensor" not in str(error):
                raise
            name = type(self.model).__name__
            raise ConfigError(f"distributed.strategy fsdp2 cannot shard {name}: {one_line(error)}; ddp can train it") from error

    def weights_changed(self) -> None:
        """Free gathered weights. The outermost ones stay gathered after a forward pass without a backward pass."""
        for module in self.loss_model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def update(self, judge: Judge) -> Judged:
        """Clip the gradient, judge, and update the local shards."""
        limit = self.config.train.grad_clip or math.inf
        if self.offloaded:
            norm = self.clip_on_cpu(limit)
        else:
            found: Any = nn.utils.clip_grad_norm_(self.parameters.values(), limit)
            norm = found.full_tensor() if is_dtensor(found) else found
        judged = judge(norm)
        if self.admit(judged):
            for name, shard in self.shards.items():
                if (grad := self.parameters[name].grad) is not None:
                    shard.weight.grad = local(grad).reshape(-1)
            self.optimizer.step()
        self.optimizer.zero_grad()
        for p in self.parameters.values():
            p.grad = None
        return judged

    def clip_on_cpu(self, limit: float) -> Tensor:
        """Clip the gradients, which are in host memory. Returns the norm of the whole gradient, on this rank's device.

        Only the sum of squares is sent, from the device, because NCCL cannot send from host memory.
        """
        grads = [local(p.grad) for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads).to(self.device)
        if self.world > 1:
            dist.all_reduce(norm.square_())
            norm = norm.div_(self.copies).sqrt_()
        scale = limit / (norm.item() + 1e-6)  # as in torch's clip_grad_norm_
        if scale < 1:
            for grad in grads:
                grad.mul_(scale)
        return norm

    def admit(self, judged: Judged) -> bool:
        """Decide as under every strategy. But if the optimizer works on the host, the host waits for the device's verdict."""
        return not judged.refused if self.offloaded else super().admit(judged)


def parts_of(block: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that `block` calls: its children, and in place of a list or dict its members."""
    for child in block.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from parts_of(child)
        else:
            yield child


def owners(part: nn.Module) -> list[nn.Module]:
    """Return the modules in `part` that have parameters of their own."""
    return [m for m in part.modules() if next(m.parameters(recurse=False), None) is not None]


def norms_in(part: nn.Module) -> list[nn.Module]:
    """Return the norms in `part` that have a weight, of any class with "norm" in its name: LayerNorm, Qwen3RMSNorm, ..."""
    return [m for m in owners(part) if "norm" in type(m).__name__.lower() and not isinstance(m, LINEAR)]


def is_halved(part: nn.Module) -> bool:
    """Return whether the weights of `part`, except norms, may be gathered in bfloat16: autocast rounds all of them before use."""
    others = set(owners(part)) - set(norms_in(part))
    return bool(others) and all(isinstance(m, LINEAR) for m in others)


def allocate(model: nn.Module, device: torch.device) -> None:
    """Allocate memory on `device` for the parameters of `model`. Its buffers are there already and keep their values."""
    buffers = [(m, name, buffer) for m in model.modules() for name, buffer in m.named_buffers(recurse=False)]
    model.to_empty(device=device)
    for module, name, buffer in buffers:
        setattr(module, name, buffer)


def flat_local_shard(p: Tensor) -> Tensor:
    """Return the local shard of a DTensor as a vector that shares its memory. The vector's `local_shard` describes it."""
    flat: Any = local(p).detach().view(-1)
    flat.local_shard = local_shard_of(p)
    return flat
