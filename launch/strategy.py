"""`distributed.strategy` -> an Accelerator whose processes, devices and precision are what the configuration asked for."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from configs.load import ConfigError
from configs.schema import Config
from models import peak_flops

BUILT = ("ddp",)


def make_accelerator(config: Config, logging_dir: str) -> Accelerator:
    """The Accelerator of this process: one process, or one of those that torchrun or `accelerate launch` started.

    Raises:
        ConfigError: a strategy that is not built, a tracker that is not installed, or processes that do not see each other.
    """
    strategy = config.distributed.strategy
    if strategy not in BUILT:
        raise ConfigError(f"distributed.strategy '{strategy}' is not available yet; available: {', '.join(BUILT)}")
    accelerator = Accelerator(
        mixed_precision="bf16" if config.train.precision == "bf16" else "no",
        cpu=not torch.cuda.is_available(),  # without it, processes on a machine without GPUs do not find each other
        log_with=available_trackers(config.log.trackers) or None,
        project_dir=logging_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # gradients once, not twice
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise ConfigError(f"{expected} processes were started, but Accelerate sees {accelerator.num_processes}")
    return accelerator


def available_trackers(names: list[str]) -> list[str]:
    """`names` if all of them can be imported; ConfigError otherwise."""
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    for name, available in (("tensorboard", is_tensorboard_available), ("wandb", is_wandb_available)):
        if name in names and not available():
            raise ConfigError(f"log.trackers asks for {name}, which is not installed (pip install {name})")
    return names


def prepare(accelerator: Accelerator, loss_model: nn.Module, compile_blocks: bool) -> nn.Module:
    """`loss_model` on its device, wrapped for its processes; the transformer inside compiled when asked."""
    if compile_blocks:
        loss_model.model.base_model.compile()
    return accelerator.prepare_model(loss_model)


def peak(accelerator: Accelerator) -> float | None:
    """Peak FLOP/s of this process's device in the precision of the run, where it is known."""
    if accelerator.device.type != "cuda":
        return None
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    return peak_flops(torch.cuda.get_device_name(accelerator.device), dtype)
