"""Checks that a configuration fits the checkpoint from which a run resumes, and words the error if it does not.

docs/training.md has the table of options that may change and options that may not.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from celo2 import Celo2, Rule, RuleError, load_rule
from configs.length import batch_sizes
from configs.schema import Config
from configs.schema import Optimizer as OptimizerConfig
from data.shards import TokenShards
from launch.checkpoint.folders import run_of
from launch.checkpoint.load import read_config, weights_alone
from launch.checkpoint.verify import CheckpointError
from launch.optimizers.decay import decoupled_arguments
from launch.optimizers.table import entry_of
from launch.optimizers.third_party import find_class
from launch.run.mixture import how_to_end, name_of_data
from models.function import NOT_SET, function_differences, plain

RULE_FILE = "rule.safetensors"  # in a run's folder: a copy of the rule that it trains with
# A key of the identity: the weight decay of a library's optimizer is decoupled. Earlier versions used the library's default.
DECOUPLED = "decoupled decay"
# Arguments of optimizers that may differ: they have an option of their own, or change how a step is computed but not its result.
FREE_ARGUMENTS = {
    "lr", "weight_decay", "rule", "state_dtype", "replicas", "shard_state", "foreach", "fused", "capturable", "differentiable",
    "ns_dtype",
}  # fmt: skip


class Difference(NamedTuple):
    """A key whose value is `there` in the checkpoint and `here` in the configuration, and what to do about it."""

    key: str
    there: Any
    here: Any
    remedy: str = ""  # empty: key=there restores it


def identity_of(config: Config, shards: TokenShards, context: int, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what a checkpoint stores, beside the configuration, to recognize its run (data, seed, rule, ...)."""
    return {
        "data set": shards.fingerprint,
        "tokenizer": shards.tokenizer_hash,
        "run.seed": config.run.seed,
        "train.batch_size": config.train.batch_size,
        "model.context": context,
        "optimizer.name": config.optimizer.name,
        "rule": rule_hash(optimizer.rule) if isinstance(optimizer, Celo2) else None,
        DECOUPLED: True,
    }


def rule_hash(rule: Rule) -> str:
    """Return the sha256 of a rule's weights and settings."""
    digest = hashlib.sha256(json.dumps(rule.settings(), sort_keys=True).encode())
    for name, weight in sorted(rule.weights.items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode() + weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def require_agreement(
    path: Path, saved: Mapping[str, Any], config: Config, model: PretrainedConfig, identity: Mapping[str, Any]
) -> None:
    """Raise CheckpointError unless the run of `config` may resume from the checkpoint `path`.

    Args:
        path: the checkpoint.
        saved: its state.json, of any version.
        config: the configuration of the run that resumes.
        model: the configuration of its model.
        identity: its identity (`identity_of`).
    """
    found = [
        *data_differences(saved, config, identity),
        *model_differences(path, saved, config, model, identity),
        *optimizer_differences(path, saved, config, identity),
    ]
    if not found:
        return
    shown = "; ".join(f"{d.key} is {as_yaml(d.there)} in the checkpoint, {as_yaml(d.here)} now" for d in found[:4])
    more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
    restore = ", ".join(dict.fromkeys(d.remedy or f"{d.key}={as_yaml(d.there)}" for d in found))
    raise CheckpointError(f"{path} does not fit this run: {shown}{more}. Restore {restore}; or {weights_alone(path)}")


def as_yaml(value: Any) -> str:
    """Return `value` as one writes it on the command line."""
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else json.dumps(value, default=str)


def data_differences(saved: Mapping[str, Any], config: Config, identity: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield differences that change the order of the data or a step's batch, and a `train.steps` below the checkpoint's step."""
    there = saved["identity"]
    if there["data set"] != identity["data set"]:
        same_tokenizer = there.get("tokenizer") in (None, identity["tokenizer"])
        (was, folder), (option, now) = name_of_data(saved["config"]["data"]), name_of_data(asdict(config.data))
        ending = how_to_end(saved["config"]["data"], asdict(config.data), saved["step"])
        found = "a folder with" if was == "data.dir" else f"the sources {folder} of"
        yield Difference(
            f"the {'data set' if same_tokenizer else 'tokenizer'} of {option}",
            f"{there['data set'][:12]} ({folder})",
            f"{identity['data set'][:12]} ({now})",
            f"{was}={found} the data set {there['data set'][:12]}{ending}",
        )
    if there["run.seed"] != config.run.seed:
        yield Difference("run.seed", there["run.seed"], config.run.seed)
    size, ramp = there["train.batch_size"], saved["config"].get("train", {}).get("ramp")
    sizes, sizes_now = batch_sizes({"batch_size": size, "ramp": ramp}), batch_sizes(vars(config.train))
    if sizes.after(saved["step"]) != sizes_now.after(saved["step"]) and config.train.on_batch_change == "refuse":
        key = "train.batch_size" if size != config.train.batch_size else "train.ramp"
        steps = ", ".join(f"{step}: {n}" for step, n in (ramp or {}).items())
        own = f" 'train.ramp={{{steps}}}'" if ramp else " train.ramp=null" if config.train.ramp else ""
        restore = f"train.batch_size={size}{own}"
        yield Difference(key, sizes.text(), sizes_now.text(), f"{restore} or train.on_batch_change=allow")
    if saved["step"] > config.train.steps:
        remedy = f"train.steps={saved['step']} or more"
        yield Difference("train.steps", f"already at step {saved['step']}", config.train.steps, remedy)


def model_differences(
    path: Path, saved: Mapping[str, Any], config: Config, model: PretrainedConfig, identity: Mapping[str, Any]
) -> Iterator[Difference]:
    """Yield differences that change the function of the model or the length of sequences."""
    there, before = read_config(path), saved["config"]["model"]
    now, init = config.model.init, before.get("init")
    if now is not None and now != init and (init is None or os.path.realpath(now) != os.path.realpath(init)):
        yield Difference("model.init", init or NOT_SET, now, f"model.init={init}" if init else "no model.init")
    context = saved["identity"]["model.context"] or there.get("context")  # an earlier version stored model.context as configured
    if context != identity["model.context"]:
        yield Difference("model.context", context, identity["model.context"])
    given = {*(before.get("hf") or {}), *(config.model.hf or {})}
    try:
        differences = function_differences(there, model, given)
    except Exception as error:  # transformers raises many types of errors for values of a wrong type
        raise CheckpointError(f"{path / 'config.json'} is damaged: {' '.join(str(error).split())}") from None
    for key, (old, new) in differences.items():
        if model.model_type == "gpt3" and key == "context":
            continue  # the number of positions of a GPT-3; training sequences may be shorter
        own = key == "vocab_size" or (model.model_type == "gpt3" and key != "model_type")
        name = f"model.{key}" if own else f"model.hf.{key.removeprefix('rope_parameters.')}"
        yield Difference(name, old, new, f"no {name}" if old == NOT_SET else "")


def optimizer_differences(
    path: Path, saved: Mapping[str, Any], config: Config, identity: Mapping[str, Any]
) -> Iterator[Difference]:
    """Yield differences that change the meaning of the optimizer's state."""
    now, before = config.optimizer, saved["config"]["optimizer"]
    was = OptimizerConfig(**{f.name: before[f.name] for f in fields(OptimizerConfig) if f.name in before})
    if was.name != now.name:
        yield Difference("optimizer.name", was.name, now.name)
        return
    if entry_of(was).route != entry_of(now).route:
        yield Difference("optimizer.route", entry_of(was).route, entry_of(now).route)
    if bool(was.ema_nesterov) != bool(now.ema_nesterov):
        yield Difference("optimizer.ema_nesterov", was.ema_nesterov, now.ema_nesterov)
    same_decay = DECOUPLED in saved["identity"] or not was.weight_decay or was.cautious_weight_decay
    old, new = effective_arguments(was, decoupled=same_decay), effective_arguments(now)
    for key in sorted(old.keys() | new.keys()):
        pair = old.get(key, NOT_SET), new.get(key, NOT_SET)
        if plain(pair[0]) != plain(pair[1]):
            yield Difference(f"optimizer.arguments.{key}", *pair)
    if identity["rule"] is None:
        return
    name, content = was.rule or was.name, saved["identity"].get("rule")
    if content is None and name != (now.rule or now.name):  # an earlier version stored only the name
        content = content_of(name)
    elif content is None:
        content = identity["rule"]
    if content != identity["rule"]:
        copy = run_of(path) / RULE_FILE
        remedy = copy if content_of(copy) == content else name if content_of(name) == content else f"the rule that {name} was"
        yield Difference(
            "optimizer.rule",
            f"{name} with the content {str(content)[:12]}",
            f"{now.rule or now.name} with {identity['rule'][:12]}",
            f"optimizer.rule={remedy}",
        )


def effective_arguments(config: OptimizerConfig, decoupled: bool = True) -> dict[str, Any]:
    """Return the arguments of the optimizer's constructor on which its state or step depends, defaults included.

    `decoupled`: include the arguments that decouple the weight decay, as `launch.optimizers.build` passes them.
    """
    entry = entry_of(config)
    cls = find_class(entry.path, entry.package)
    parameters = inspect.signature(cls).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    defaults |= decoupled_arguments(cls) if decoupled else {}
    given = defaults | entry.arguments | (config.arguments or {})
    return {key: value for key, value in given.items() if key not in FREE_ARGUMENTS}


def content_of(rule: str | Path) -> str | None:
    """Return the `rule_hash` of a rule given by name or path; None if there is no such rule."""
    try:
        return rule_hash(load_rule(rule))
    except RuleError:
        return None
