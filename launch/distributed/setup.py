"""Makes the `Strategy` of `distributed.strategy`, which spreads a training run over processes, and the Accelerator.

With every strategy, the same model, batches and optimizer lead to the same weights. Strategies differ in what each rank holds and
in what the ranks send each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers import PreTrainedModel

from configs.average import average_of
from configs.load import ConfigError
from configs.schema import Config
from data import first_line
from launch.distributed.average import Average
from launch.distributed.ddp import DDP
from launch.distributed.environment import check_environment
from launch.distributed.fsdp2 import FSDP2
from launch.distributed.heartbeat import COLLECTIVE_TIMEOUT
from launch.distributed.host_group import HostGroup
from launch.distributed.rendezvous import init_method
from launch.distributed.strategy import Strategy
from launch.distributed.zero import Zero
from launch.monitoring.trackers import require_installed
from launch.private import forget_accelerator, set_collective_timeout
from models import peak_flops
from models.initialization import Held, Weights

STRATEGIES: dict[str, type[Strategy]] = {"ddp": DDP, "zero1": Zero, "zero2": Zero, "zero3": Zero, "fsdp2": FSDP2}


def make_strategy(
    config: Config,
    accelerator: Accelerator,
    model: PreTrainedModel,
    weights: Weights | None = None,
    strategies: Mapping[str, type[Strategy]] = STRATEGIES,
) -> Strategy:
    """Return the strategy of `config` for `model`, which must be equal on every rank. Its shards are checked over all ranks.

    Without `weights`, the weights are taken out of `model`, which is then whole and in memory.

    Raises:
        ConfigError: a package is missing, or the strategy does not support the optimizer or the model.
        ShardingError: some elements of a parameter are on no rank or on two ranks.
    """
    strategy = strategies[config.distributed.strategy](config, accelerator, model, weights or Held(model))
    set_collective_timeout(COLLECTIVE_TIMEOUT)  # for the groups that the strategy made, too
    strategy.check()
    if (options := average_of(config)) is not None:
        weights_here = {name: shard.weight for name, shard in strategy.shards.items()}
        strategy.average = Average(options, weights_here, accelerator.device)
    divided = next((s.local_shard.group for s in strategy.shards.values() if s.local_shard.group is not None), None)
    strategy.host = HostGroup(accelerator.process_index, accelerator.num_processes, divided)
    return strategy


def make_accelerator(config: Config) -> Accelerator:
    """Return the Accelerator of this process, which runs alone or was started by torchrun, `accelerate launch` or `deepspeed`.

    The Accelerator handles processes, devices and precision. Sharding is done by the strategy, not by Accelerate's plugins: these
    are silently ignored without a GPU and do not support local shards.

    Raises:
        ConfigError: a tracker is not installed, the launcher's environment contradicts the configuration (`check_environment`),
            there are more processes than GPUs, or the processes do not find each other.
    """
    expected = check_environment(config)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; start one process for each"
        )
    require_installed(config)
    forget_accelerator()
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if config.train.precision == "bf16" else "no",
            cpu=not torch.cuda.is_available(),  # without it, processes on a machine without GPUs do not find each other
            kwargs_handlers=[
                InitProcessGroupKwargs(init_method=init_method(), timeout=timedelta(seconds=config.distributed.timeout))
            ],
        )
    except RuntimeError as error:  # DistError: the port is taken, the address unknown, or a rank does not come
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error).lower():
            raise
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"the {expected} processes do not find each other at {where} (MASTER_ADDR, MASTER_PORT): {first_line(error)}"
        ) from None
    if accelerator.num_processes != expected:
        raise ConfigError(f"{expected} processes were started, but Accelerate sees {accelerator.num_processes}")
    set_collective_timeout(COLLECTIVE_TIMEOUT)
    return accelerator


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """If `wanted`, make torch use only deterministic algorithms in this context. Enter it before the first call of cuBLAS.

    Raises:
        ConfigError: an operation has no deterministic algorithm.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise ConfigError(f"train.deterministic: {first_line(error)}") from error
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark


def peak(accelerator: Accelerator) -> float | None:
    """Return the peak FLOP/s of this process's device in the precision of the training run; None if unknown."""
    if accelerator.device.type != "cuda":
        return None
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    return peak_flops(torch.cuda.get_device_name(accelerator.device), dtype)


def memory(accelerator: Accelerator) -> dict[str, float]:
    """Return `peak_memory_gb`, the most memory that tensors of this process have used on its GPU so far; empty without a GPU."""
    if accelerator.device.type != "cuda":
        return {}
    return {"peak_memory_gb": torch.cuda.max_memory_allocated(accelerator.device) / 1e9}
