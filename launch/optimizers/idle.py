"""The table of settings that can be without effect: what each needs of the optimizer, the strategy or another setting."""

from __future__ import annotations

from celo2.training.idle import Idle
from configs.schema import Config
from launch.optimizers.table import chooses_route, decays, entry_of, names_that_take_a_rule, uses_adamw_lr
from launch.optimizers.third_party import find_class
from models.sizes import SIZES


def takes_rule(config: Config) -> bool:
    """Whether the optimizer runs a rule."""
    return entry_of(config.optimizer).takes_rule


def averages(config: Config) -> bool:
    """Whether the optimizer keeps two sets of weights: one to train on, and an average to evaluate."""
    entry = entry_of(config.optimizer)
    return hasattr(find_class(entry.path, entry.package), "eval")


WITH_RULE = names_that_take_a_rule()
FOR_A_RULE = f"{{value}} is for {WITH_RULE}, not for {{choice}}"
IDLE = (
    Idle(
        "model.size",
        "model.width",
        lambda c: c.model.size not in SIZES or None in (c.model.layers, c.model.width, c.model.heads, c.model.context),
        "{value} has no effect beside model.layers, model.width, model.heads and model.context (null takes the size's)",
        detail=True,
    ),
    Idle("optimizer.rule", "optimizer.name", takes_rule, FOR_A_RULE, detail=True),
    Idle("optimizer.state_dtype", "optimizer.name", takes_rule, FOR_A_RULE),
    Idle(
        "optimizer.adamw_lr",
        "optimizer.name",
        lambda c: uses_adamw_lr(c.optimizer),
        "{value} applies only to parameters that AdamW trains, and {choice} trains all parameters itself",
        detail=True,
    ),
    Idle(
        "optimizer.route",
        "optimizer.name",
        lambda c: c.optimizer.route == "hidden" or chooses_route(c.optimizer),  # "hidden": earlier versions wrote it for all
        "{value} applies only to optimizers from a library, and {choice} has its own route",
    ),
    Idle(
        "optimizer.ema_nesterov_decay",
        "optimizer.ema_nesterov",
        lambda c: c.optimizer.ema_nesterov > 0,
        "{value} is for optimizer.ema_nesterov, which is {choice}",
        detail=True,
    ),
    Idle(
        "distributed.shard_state",
        "optimizer.ema_nesterov",
        lambda c: c.optimizer.ema_nesterov == 0,
        "has no effect with optimizer.ema_nesterov {choice}, for which every rank needs the whole optimizer state",
    ),
    Idle(
        "optimizer.cautious_weight_decay",
        "optimizer.weight_decay",
        lambda c: c.optimizer.weight_decay > 0,
        "has no effect, since optimizer.weight_decay is {choice}",
    ),
    *(
        Idle(key, "optimizer.name", lambda c: decays(c.optimizer), "is not for {choice}, which has no weight decay", detail=True)
        for key in ("optimizer.weight_decay", "optimizer.cautious_weight_decay")
    ),
    Idle(
        "optimizer.base_width",
        "optimizer.name",
        lambda c: entry_of(c.optimizer).width_rule != "none",
        "has no effect with {choice}, which uses the same rates at every width",
        detail=True,
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
        lambda c: c.schedule.kind != "constant" or c.schedule.cooldown > 0,
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
    *(
        Idle(
            key,
            "log.trackers",
            lambda c: bool(set(c.log.trackers) - {"tensorboard"}),
            "{value} is for trackers other than tensorboard, and log.trackers is {choice}",
            detail=True,
        )
        for key in ("log.project", "log.group")
    ),
    Idle(
        "eval.tasks_every",
        "eval.tasks",
        lambda c: bool(c.eval.tasks or c.eval.lm_eval),
        "{value} is for eval.tasks and eval.lm_eval, and neither is set",
    ),
    Idle(
        "eval.task_examples",
        "eval.tasks",
        lambda c: bool(c.eval.tasks or c.eval.lm_eval),
        "{value} is for eval.tasks and eval.lm_eval, and neither is set",
    ),
    Idle("eval.lm_eval_include", "eval.lm_eval", lambda c: bool(c.eval.lm_eval), "{value} is for eval.lm_eval, which is empty"),
    Idle(
        "train.average",
        "optimizer.name",
        lambda c: not averages(c),
        "is not for {choice}, whose weights are an average already",
    ),
    Idle(
        "checkpoint.keep_best",
        "eval.every",
        lambda c: c.eval.every > 0,
        "compares evaluations, and with eval.every {choice} there is only one",
    ),
)
