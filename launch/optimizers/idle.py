"""Which settings of a training run act: by what the optimizer, the strategy and the schedule take, and what is logged."""

from __future__ import annotations

from celo2.training.idle import Idle
from configs.schema import Config
from launch.optimizers.table import entry_of, names_that_take_a_rule


def takes_rule(config: Config) -> bool:
    """Whether the optimizer runs a rule."""
    return entry_of(config.optimizer).takes_rule


WITH_RULE = names_that_take_a_rule()
FOR_A_RULE = f"{{value}} is for {WITH_RULE}, not for {{choice}}"
IDLE = (
    Idle("optimizer.rule", "optimizer.name", takes_rule, FOR_A_RULE),
    Idle("optimizer.state_dtype", "optimizer.name", takes_rule, FOR_A_RULE),
    Idle(
        "optimizer.adamw_lr",
        "optimizer.name",
        lambda c: not entry_of(c.optimizer).all_hidden,
        "{value} is for what AdamW trains, and {choice} trains everything itself",
        detail=True,
    ),
    Idle(
        "optimizer.route",
        "optimizer.name",
        lambda c: "." in c.optimizer.name,
        "{value} is for a dotted path, and {choice} has a route of its own",
    ),
    Idle("distributed.shard_state", "optimizer.name", takes_rule, f"divides the state of {WITH_RULE}, not of {{choice}}"),
    Idle(
        "distributed.shard_state",
        "distributed.strategy",
        lambda c: c.distributed.strategy == "ddp",
        "is for ddp; {choice} divides the state without it",
    ),
    Idle(
        "distributed.replicas",
        "distributed.strategy",
        lambda c: c.distributed.strategy == "fsdp2",
        "{value} is for fsdp2, not for {choice}",
    ),
    Idle(
        "distributed.offload",
        "distributed.strategy",
        lambda c: c.distributed.strategy == "fsdp2",
        "is for fsdp2, not for {choice}",
    ),
    Idle(
        "schedule.final",
        "schedule.kind",
        lambda c: c.schedule.kind != "constant",
        "{value} is not for schedule.kind {choice}, which never decays",
        detail=True,
        wish=True,
    ),
    Idle(
        "schedule.decay",
        "schedule.kind",
        lambda c: c.schedule.kind == "wsd",
        "{value} is for wsd, not for schedule.kind {choice}",
        detail=True,
        wish=True,
    ),
    Idle(
        "log.project",
        "log.trackers",
        lambda c: "wandb" in c.log.trackers,
        "{value} is for wandb, which is not among log.trackers {choice}",
        detail=True,
    ),
    Idle(
        "log.group",
        "log.trackers",
        lambda c: "wandb" in c.log.trackers,
        "{value} is for wandb, which is not among log.trackers {choice}",
        detail=True,
    ),
    Idle(
        "checkpoint.keep_best",
        "eval.every",
        lambda c: c.eval.every > 0,
        "compares evaluations, and with eval.every {choice} there is only one",
    ),
)
