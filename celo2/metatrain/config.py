"""The configuration of a meta-training: one flat dataclass, from YAML and `key=value`. The defaults are the published recipe."""

from __future__ import annotations

import difflib
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from celo2.rule import weight_shapes


class MetatrainError(ValueError):
    """A meta-training or evaluation that cannot run as asked; the message names what is wrong."""


def option(default: Any, doc: str) -> Any:
    """A field with its default and its documentation."""
    if isinstance(default, list):
        return field(metadata={"doc": doc}, default_factory=default.copy)
    return field(metadata={"doc": doc}, default=default)


@dataclass(frozen=True)
class Config:
    """Keys of a meta-training. Symbols of the paper (arXiv 2602.19142) and of PES in brackets."""

    run_dir: str = option("runs/metatrain", "folder of checkpoints, metrics, curve and rules; the same command continues it")
    variant: Literal["celo2", "celo2-base"] = option(
        "celo2", "celo2: orthogonalized, Adam for biases, embeddings and head; celo2-base: the rule alone"
    )
    seed: int = option(0, "every random number is a function of this, the iteration and the inner problem")
    iterations: int = option(100_000, "outer iterations")

    tasks: list[str] = option(
        ["hub:mnist", "hub:fashion_mnist", "hub:cifar10", "hub:svhn"],
        "images: digits, hub:NAME, FILE.npz (all of its sets), FILE.npz:NAME; text: text:FILE, FILE a .txt, .jsonl, .jsonl.gz",
    )
    problems_per_task: int = option(8, "inner problems per task, each with both signs")
    batch_size: int = option(64, "images per inner step; of text always 8 sequences of 32 bytes")
    inner_lr: float = option(1e-3, "inner learning rate of an image network's matrices (celo2-base: of everything)")
    inner_adam_lr: float = option(0.02, "inner learning rate of an image network's biases under Adam (celo2)")
    inner_schedule: Literal["constant", "cosine"] = option(
        "constant", "cosine: warm-up over 5 % of an inner problem, then down to a tenth; constant: published"
    )
    normalize_gradient: bool = option(False, "the rule divides a gradient by its RMS before all else; the rule's file says so")
    odd: bool = option(False, "keep the rule odd: -g and -W give -u, as in every optimizer set by hand; half of θ is free then")
    frozen: list[str] = option([], "weights of the rule that keep the value they have in `init`, such as w0__2: the channel of W")
    truncation: int = option(50, "inner steps per outer iteration")
    min_length: int = option(100, "shortest inner problem, in steps; lengths are log-uniform")
    max_length: int = option(2000, "longest inner problem, in steps")
    staggered: bool = option(
        True, "inner problems start at ages spread over their lengths; false: at 0, and a truncation of one length is an episode"
    )
    reparametrization: Literal["none", "global", "tensor", "parameter"] = option(
        "global", "what shares one scale s: all weights of a problem, a tensor, or nothing"
    )
    min_scale: float = option(1e-3, "smallest s; s is log-uniform, the optimizer sees w / s")
    max_scale: float = option(1e3, "largest s")
    text_layers: int = option(1, "blocks of the transformer that text tasks train, of width 32")
    text_lr: float = option(2e-3, "inner learning rate of a transformer's hidden matrices (celo2-base: of everything)")
    text_adam_lr: float = option(3e-3, "inner learning rate of its embeddings and its head under Adam (celo2)")
    text_min_scale: float = option(0.5, "smallest s of text problems; s multiplies their learning rates, too")
    text_max_scale: float = option(2.0, "largest s of text problems")

    sigma: float = option(0.01, "standard deviation of the perturbation ε")
    loss_clip: float | None = option(None, "inner losses count at most this many times the loss of a uniform guess; null: raw")
    scale_buckets: int = option(0, "divide loss differences by their running RMS per task and bucket of log s; 0: do not")
    outer_lr: float = option(5e-5, "learning rate of the outer AdamW (published: 5e-5 celo2, 1e-4 celo2-base)")
    outer_betas: list[float] = option([0.9, 0.999], "decays of the outer AdamW")
    outer_weight_decay: float = option(0.0, "decoupled weight decay of the outer AdamW")
    average: float = option(0.0, "decay of the running mean of θ that becomes the rule; 0: the last θ")
    init: str = option("random", "first θ: random, or a rule by name or path")
    init_noise: float = option(0.0, "standard deviation of normal noise on the first θ")

    engine: Literal["auto", "fast", "plain"] = option("auto", "fast: Numba, CPU; plain: batched torch; auto: fast on CPU")
    device: str = option("cpu", "torch device of the plain engine")
    threads: int = option(0, "threads of the fast engine; 0: one per core. The result does not depend on it")
    checkpoint_every: int = option(200, "outer iterations between checkpoints")
    snapshot_every: int = option(2000, "outer iterations between the rules kept in run_dir/rules")
    log_every: int = option(20, "outer iterations per line of metrics.jsonl")


# Keys that may differ when a run continues: they change how it is run, not what it computes.
FREE_KEYS = {"run_dir", "iterations", "threads", "checkpoint_every", "snapshot_every", "log_every"}
AT_LEAST = {
    "seed": 0,
    "iterations": 1,
    "problems_per_task": 1,
    "batch_size": 1,
    "truncation": 1,
    "min_length": 1,
    "inner_lr": 0,
    "inner_adam_lr": 0,
    "text_layers": 1,
    "text_lr": 0,
    "text_adam_lr": 0,
    "scale_buckets": 0,
    "outer_lr": 0,
    "outer_weight_decay": 0,
    "init_noise": 0,
    "threads": 0,
    "checkpoint_every": 1,
    "snapshot_every": 1,
    "log_every": 1,
}


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """The configuration of the YAML file `path` with `key=value` overrides.

    Raises:
        MetatrainError: no such file, no YAML mapping, an unknown key (naming the nearest right one), a wrong type or value.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise MetatrainError(f"cannot read configuration '{path}' ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MetatrainError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise MetatrainError(f"{path}: expected keys like 'seed:', found a {type(tree).__name__}")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise MetatrainError(f"'{override}': expected key=value")
        try:
            tree[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise MetatrainError(f"'{override}': the value is not YAML") from None
    return build(tree)


def build(tree: dict[str, Any]) -> Config:
    """A checked configuration from a mapping."""
    hints = typing.get_type_hints(Config)
    for key in tree:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            raise MetatrainError(f"unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else ""))
    config = Config(**{key: checked(hints[key], value, key) for key, value in tree.items()})
    for key, minimum in AT_LEAST.items():
        if not getattr(config, key) >= minimum:
            raise MetatrainError(f"{key} is {getattr(config, key)}, expected at least {minimum}")
    if not config.tasks:
        raise MetatrainError("tasks is empty, expected at least one data set")
    for name in config.frozen:
        if name not in weight_shapes(hidden=8):
            raise MetatrainError(
                f"frozen: the rule has no weight '{name}', expected some of {', '.join(weight_shapes(hidden=8))}"
            )
    if config.frozen and config.outer_weight_decay:
        raise MetatrainError(f"outer_weight_decay is {config.outer_weight_decay}, expected 0 with frozen weights")
    if config.min_length < config.truncation:
        raise MetatrainError(
            f"min_length is {config.min_length}, expected at least truncation ({config.truncation}): one reset a truncation"
        )
    for low, high in (("min_length", "max_length"), ("min_scale", "max_scale"), ("text_min_scale", "text_max_scale")):
        if not 0 < getattr(config, low) <= getattr(config, high):
            raise MetatrainError(f"{low} is {getattr(config, low)}, expected above 0 and at most {high}")
    if config.checkpoint_every % config.log_every:
        raise MetatrainError(
            f"checkpoint_every is {config.checkpoint_every}, expected a multiple of log_every ({config.log_every}): "
            "a line of metrics must not span a checkpoint"
        )
    if not config.sigma > 0:
        raise MetatrainError(f"sigma is {config.sigma}, expected above 0")
    if config.loss_clip is not None and not config.loss_clip > 0:
        raise MetatrainError(f"loss_clip is {config.loss_clip}, expected above 0")
    if not 0 <= config.average < 1:
        raise MetatrainError(f"average is {config.average}, expected in [0, 1)")
    if len(config.outer_betas) != 2 or not all(0 <= beta < 1 for beta in config.outer_betas):
        raise MetatrainError(f"outer_betas is {config.outer_betas}, expected two numbers in [0, 1)")
    return config


def checked(kind: Any, value: Any, key: str) -> Any:
    """`value` if it is of type `kind`; integers pass for floats, and so do the exponents that YAML reads as text (1e-3)."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else checked(arguments[0], value, key)
    if origin is Literal:
        if value not in arguments:
            raise MetatrainError(f"{key} is '{value}', expected one of {', '.join(arguments)}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise MetatrainError(f"{key} is {value!r}, expected a list")
        return [checked(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            value = float(value)
        except ValueError:
            raise MetatrainError(f"{key} is '{value}', expected a number") from None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise MetatrainError(f"{key} is {value!r}, expected {kind.__name__}")
    return value


def help_text() -> str:
    """One line per key: name, default, meaning."""
    values = asdict(Config())
    return "\n".join(f"  {f.name} = {values[f.name]}: {f.metadata['doc']}" for f in fields(Config))
