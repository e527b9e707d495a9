"""DeepSpeed ZeRO: optimizer state (1), gradients (2) and weights (3) are cut into flat runs, one for each rank."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from celo2.distributed.deepspeed import ZeroClient
from configs.load import ConfigError
from configs.schema import Config
from launch.distributed.strategy import Judge, Shard, Strategy, named_shards
from launch.monitoring.guard import Verdict
from launch.optimizers.build import build_optimizer, optimizer_groups
from models import CausalLMLoss


class Zero(Strategy):
    """DeepSpeed's engine around the loss module; its optimizer is `ZeroClient`, which steps the real one.

    Weights and communication are float32, and bf16 is autocast, as under DDP.
    """

    def __init__(self, config: Config, accelerator: Accelerator, model: PreTrainedModel) -> None:
        super().__init__(config, accelerator, model)
        deepspeed = import_deepspeed(accelerator.device)
        names = dict(model.named_parameters())
        groups = optimizer_groups(config.optimizer, model)
        self.client = ZeroClient(groups)
        self.engine, *_ = deepspeed.initialize(
            model=CausalLMLoss(model), optimizer=self.client, config=engine_config(config, self.world)
        )
        self.loss_model = self.engine
        self.zero = self.engine.optimizer
        self.optimizer = self.client.bind(self.zero, lambda groups: build_optimizer(config.optimizer, groups))
        runs = named_shards(self.optimizer.param_groups, names)
        self.shards = {name: Shard(run, run.local_shard, []) for name, run in runs.items()}

    def backward(self, micro_batches: list[tuple[Tensor, Tensor]], n_targets: int) -> Tensor:
        """As everywhere; the engine counts the micro-batches of a step and is told about all but the last here."""
        self.left = len(micro_batches)
        return super().backward(micro_batches, n_targets)

    def differentiate(self, loss: Tensor) -> None:
        """Through the engine, without its division by the number of micro-batches."""
        self.engine.backward(loss, scale_wrt_gas=False)
        self.left -= 1
        if self.left:
            self.engine.step()

    def step(self, judge: Judge) -> Verdict:
        """DeepSpeed reduces, clips and calls the client, which asks `judge` first.

        A gradient that is not finite never gets that far: DeepSpeed drops it.
        """
        verdicts: list[Verdict] = []

        def gate() -> bool:
            if not verdicts:
                verdicts.append(judge(torch.as_tensor(self.zero._global_grad_norm)))
            return verdicts[0].healthy

        self.client.gate = gate
        self.engine.step()
        if not verdicts:
            verdicts.append(judge(torch.tensor(float("nan"), device=self.accelerator.device)))
        return verdicts[0]

    def weights_changed(self) -> None:
        """Give the model what the flat vectors hold."""
        if hasattr(self.zero, "update_lp_params"):  # stages 1 and 2 compute with a copy
            self.zero.update_lp_params()
        else:  # what stage 3 does at the end of a step
            self.zero._partition_all_parameters()
            for i in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(i)
            if self.zero.persistent_parameters:  # small ones stay gathered
                self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)


def import_deepspeed(device: torch.device) -> Any:
    """The module `deepspeed`, told which device it works on."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # a single process without a launcher
    try:
        import deepspeed
    except ImportError:
        raise ConfigError("distributed.strategy zero1, zero2 and zero3 need deepspeed (pip install deepspeed)") from None
    # It would compile C++ for its inference on CPUs at the first start; its own calls are deprecated in newer torch; and the
    # optimizer that it calls untested is one that was made for it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.utils.logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    return deepspeed


def engine_config(config: Config, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration: everything travels in float32, so that the strategy changes nothing but memory and speed."""
    micro = config.train.micro_batch_size
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.train.batch_size // (micro * world),
        "gradient_clipping": config.train.grad_clip,
        "zero_optimization": {"stage": int(config.distributed.strategy[-1])},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": config.train.precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "steps_per_print": 1 << 62,
    }
