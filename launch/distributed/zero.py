"""DeepSpeed ZeRO: optimizer state (stage 1), gradients (2) and weights (3) are sharded as flat vectors, one for each rank."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from celo2.distributed.deepspeed import ZeroClient
from configs.load import ConfigError
from configs.schema import Config
from data.batches import fit_micro_batch
from launch.distributed.birth import fill
from launch.distributed.strategy import Judge, Strategy, sharded_parameters
from launch.monitoring.guard import Judged
from launch.optimizers.build import build_optimizer
from launch.private import (
    forbid_deepspeed_compilation,
    zero3_refresh_weights,
    zero_end,
    zero_forget_lost_groups,
    zero_gradient_norm,
    zero_in_float32,
    zero_outline,
)
from models import CausalLMLoss
from models.initialization import Weights

# Elements of a communication buffer for gradients or weights, 200 MB; DeepSpeed's default is ten times as large. Stage 3
# allocates it at the start, for any size of model.
BUCKET = 50_000_000


@contextmanager
def local_rank() -> Iterator[None]:
    """Set LOCAL_RANK to 0 in this context if no launcher has set it, because DeepSpeed reads it in every call.

    Afterwards it is removed, because the next training run in this process would take it for a launcher's.
    """
    launched = "LOCAL_RANK" in os.environ
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        yield
    finally:
        if not launched:
            os.environ.pop("LOCAL_RANK", None)


class Zero(Strategy):
    """DeepSpeed's engine around the loss module. Its optimizer is a `ZeroClient`, which steps the real optimizer.

    As under DDP, weights and communication are float32, and bf16 is autocast.
    """

    fills_gradients = True
    zero_options: ClassVar[dict[str, Any]] = {}  # further options for DeepSpeed's section zero_optimization

    @local_rank()
    def __init__(self, config: Config, accelerator: Accelerator, model: PreTrainedModel, weights: Weights) -> None:
        super().__init__(config, accelerator, model, weights)
        self.whole = config.distributed.strategy != "zero3"
        deepspeed = import_deepspeed(accelerator.device)
        zero_forget_lost_groups(deepspeed)
        names = dict(model.named_parameters())
        self.client = ZeroClient(self.groups)
        options = engine_config(config, self.world, self.zero_options)
        zero_outline(deepspeed, model, options)
        self.compile()
        with zero_in_float32(deepspeed, model):
            self.engine, *_ = deepspeed.initialize(model=CausalLMLoss(model), optimizer=self.client, config=options)
        self.loss_model = self.engine
        self.zero = self.engine.optimizer
        self.optimizer = self.client.bind(self.zero, lambda groups: build_optimizer(config.optimizer, groups))
        self.shards = sharded_parameters(self.optimizer.param_groups, names)
        if self.whole:
            for name in self.shards:
                fill(names[name], weights, name)
            self.zero.refresh_fp32_params()
        else:
            for name, shard in self.shards.items():
                fill(shard.weight, weights, name, shard.local_shard.start)
            self.weights_changed()

    def __exit__(self, *_: object) -> None:
        zero_end(self.engine)

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Tell DeepSpeed whether the step ends with this micro-batch. Their number may change from step to step."""
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    @local_rank()
    def loss(self, inputs: Tensor, targets: Tensor, **options: bool) -> Tensor:
        """Compute the loss as under every strategy."""
        return super().loss(inputs, targets, **options)

    @local_rank()
    def differentiate(self, loss: Tensor) -> None:
        """Compute the gradient through the engine, without its division by the number of micro-batches."""
        self.engine.backward(loss, scale_wrt_gas=False)

    @local_rank()
    def update(self, judge: Judge) -> Judged:
        """Step the engine: DeepSpeed reduces and clips the gradient and calls the client, which asks `judge` first.

        DeepSpeed drops a gradient that is not finite before it calls the client. Then `judge` gets the norm NaN afterwards.
        """
        judged: list[Judged] = []

        def gate() -> bool:
            if not judged:
                judged.append(judge(zero_gradient_norm(self.zero)))
            return self.admit(judged[0])

        self.client.gate = gate
        self.engine.step()
        if not judged:
            judged.append(judge(torch.tensor(float("nan"), device=self.accelerator.device)))
        return judged[0]

    @local_rank()
    def weights_changed(self) -> None:
        """Copy the flat vectors into the model."""
        if hasattr(self.zero, "update_lp_params"):  # stages 1 and 2 compute with a copy of the weights
            self.zero.update_lp_params()
        else:
            zero3_refresh_weights(self.zero)


def import_deepspeed(device: torch.device) -> Any:
    """Import and return the module `deepspeed`, set up for `device`."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # a single process without a launcher
    try:
        import deepspeed
    except ImportError:
        raise ConfigError("distributed.strategy zero1, zero2 and zero3 need deepspeed (pip install deepspeed)") from None
    forbid_deepspeed_compilation(deepspeed)
    # DeepSpeed calls functions that newer versions of torch deprecate, and warns about `ZeroClient` as an untested optimizer.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.utils.logger.addFilter(says_something)
    return deepspeed


def says_something(record: logging.LogRecord) -> bool:
    """Return whether to show a line of DeepSpeed's log."""
    return "untested optimizer" not in record.getMessage()


def engine_config(config: Config, world: int, zero_options: dict[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's configuration. All communication is float32, so that the strategy changes only memory and speed."""
    micro = fit_micro_batch(config.train.batch_size, world, config.train.micro_batch_size)
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.train.batch_size // (micro * world),
        "gradient_clipping": config.train.grad_clip,
        "zero_optimization": {
            "stage": int(config.distributed.strategy[-1]),
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            **zero_options,
        },
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": config.train.precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "steps_per_print": 1 << 62,
    }
