"""The configuration of a meta-training. The defaults are the published recipe (arXiv 2602.19142)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from celo2.rule import FIRST_LAYER, weight_shapes
from celo2.training import configuration
from celo2.training.configuration import DECAY, NOT_EMPTY, POSITIVE, ConfigError, at_least, option, renamed, section

HIDDEN = 8  # hidden units H of the rule's two layers
GROUP_OF = {weight: group for group, weight in FIRST_LAYER.items()}
FREEZABLE = [GROUP_OF.get(weight, weight) for weight in weight_shapes(HIDDEN)]


@dataclass
class Run:
    dir: str = option(
        "runs/metatrain", "folder of the training run; the same command continues it", NOT_EMPTY, was="run_dir", path=True
    )
    seed: int = option(0, "every random number is a function of it, the iteration and the problem", at_least(0), was="seed")


@dataclass
class Tasks:
    sources: list[str] = option(
        ["hub:mnist", "hub:fashion_mnist", "hub:cifar10", "hub:svhn"],
        "images: digits, hub:NAME, FILE.npz (all of its sets), FILE.npz:NAME; text: text:FILE, FILE a .txt, .jsonl, .jsonl.gz",
        NOT_EMPTY,
        was="tasks",
        path=True,
    )
    problems: int = option(8, "inner problems per task, each unrolled with both signs of ε", at_least(1), was="problems_per_task")


@dataclass
class Images:
    batch_size: int = option(64, "images per inner step", at_least(1), was="batch_size")
    lr: float = option(1e-3, "learning rate of matrices (celo2-base: of everything)", at_least(0), was="inner_lr")
    adam_lr: float = option(0.02, "learning rate of biases under Adam (celo2)", at_least(0), was="inner_adam_lr")
    min_scale: float = option(1e-3, "smallest s; s is log-uniform, the optimizer sees w / s", POSITIVE, was="min_scale")
    max_scale: float = option(1e3, "largest s", POSITIVE, was="max_scale")


@dataclass
class Text:
    layers: int = option(1, "blocks of the transformer, of width 32, on 8 sequences of 32 bytes", at_least(1), was="text_layers")
    lr: float = option(2e-3, "learning rate of hidden matrices (celo2-base: of everything)", at_least(0), was="text_lr")
    adam_lr: float = option(3e-3, "learning rate of embeddings and head under Adam (celo2)", at_least(0), was="text_adam_lr")
    min_scale: float = option(0.5, "smallest s; s multiplies the learning rate, too", POSITIVE, was="text_min_scale")
    max_scale: float = option(2.0, "largest s", POSITIVE, was="text_max_scale")


@dataclass
class Inner:
    truncation: int = option(50, "inner steps per outer iteration", at_least(1), was="truncation")
    min_length: int = option(100, "shortest episode in steps; lengths are log-uniform", at_least(1), was="min_length")
    max_length: int = option(2000, "longest episode in steps", at_least(1), was="max_length")
    staggered: bool = option(
        True,
        "problems start at ages spread over their episode; false: at 0, so that a truncation can be an episode",
        was="staggered",
    )
    schedule: Literal["constant", "cosine"] = option(
        "constant", "cosine: warm-up over 5 % of an episode, then down to a tenth; constant: published", was="inner_schedule"
    )
    reparametrization: Literal["none", "global", "tensor", "parameter"] = option(
        "global", "what shares one scale s: all weights of a problem, a tensor, or nothing", was="reparametrization"
    )


@dataclass
class Rule:
    variant: Literal["celo2", "celo2-base"] = option(
        "celo2", "celo2: orthogonalized, Adam for biases, embeddings and head; celo2-base: the rule alone", was="variant"
    )
    init: str = option("random", "first θ: random, or a rule by name or path", NOT_EMPTY, was="init", path=True)
    init_noise: float = option(0.0, "standard deviation of normal noise on the first θ", at_least(0), was="init_noise")
    normalize_gradient: bool = option(
        False, "the rule divides a gradient by its RMS before all else; its file says so", was="normalize_gradient"
    )
    odd: bool = option(False, "keep the rule odd: -g and -W give -u, as in optimizers set by hand; halves the free θ", was="odd")
    frozen: list[str] = option([], f"weights that keep their value in `init`: any of {', '.join(FREEZABLE)}", was="frozen")


@dataclass
class Estimator:
    sigma: float = option(0.01, "standard deviation σ of the perturbation ε", POSITIVE, was="sigma")
    loss_clip: float | None = option(
        None, "inner losses count at most this many times the loss of a uniform guess; null: raw", POSITIVE, was="loss_clip"
    )
    scale_buckets: int = option(
        0,
        "divide loss differences by their running RMS per task and bucket of log s; 0: do not",
        at_least(0),
        was="scale_buckets",
    )


@dataclass
class Outer:
    iterations: int = option(100_000, "outer iterations", at_least(1), was="iterations")
    lr: float = option(5e-5, "learning rate of AdamW (published: 5e-5 celo2, 1e-4 celo2-base)", at_least(0), was="outer_lr")
    betas: list[float] = option([0.9, 0.999], "decays of AdamW", DECAY, was="outer_betas")
    weight_decay: float = option(0.0, "decoupled weight decay of AdamW", at_least(0), was="outer_weight_decay")
    average: float = option(0.0, "decay of the running mean of θ that becomes the rule; 0: the last θ", DECAY, was="average")


@dataclass
class Engine:
    name: Literal["auto", "fast", "plain"] = option(
        "auto", "fast: compiled by Numba, CPU; plain: batched torch; auto: fast on CPU", was="engine"
    )
    device: str = option("cpu", "torch device of the plain engine", was="device")
    threads: int = option(0, "threads of the fast engine; 0: one per core. No result depends on it", at_least(0), was="threads")


@dataclass
class Checkpoint:
    every: int = option(200, "outer iterations between checkpoints", at_least(1), was="checkpoint_every")
    snapshot_every: int = option(
        2000, "outer iterations between the rules kept in the folder rules", at_least(1), was="snapshot_every"
    )


@dataclass
class Log:
    every: int = option(20, "outer iterations per line of metrics.jsonl", at_least(1), was="log_every")


@dataclass
class Config:
    run: Run = section(Run)
    tasks: Tasks = section(Tasks)
    images: Images = section(Images)
    text: Text = section(Text)
    inner: Inner = section(Inner)
    rule: Rule = section(Rule)
    estimator: Estimator = section(Estimator)
    outer: Outer = section(Outer)
    engine: Engine = section(Engine)
    checkpoint: Checkpoint = section(Checkpoint)
    log: Log = section(Log)


# What may differ when a training run continues: it changes how long and where it runs, not what it computes.
FREE = {"run.dir", "outer.iterations", "engine.threads", "checkpoint.every", "checkpoint.snapshot_every", "log.every"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of the YAML file `path` with `section.key=value` overrides; also the flat keys of earlier versions.

    Raises:
        ConfigError: as `configuration.load`, or options that contradict each other.
    """
    config = configuration.load(Config, path, overrides)
    for name in config.rule.frozen:
        if name in GROUP_OF:
            print(f"note: '{name}' in rule.frozen is now '{GROUP_OF[name]}'", file=sys.stderr)
    config.rule.frozen = [GROUP_OF.get(name, name) for name in config.rule.frozen]
    check(config)
    return config


def check(config: Config) -> None:
    """Raise ConfigError where options do not fit each other."""
    if not config.tasks.sources:
        raise ConfigError("tasks.sources is empty, expected at least one data set")
    for name in config.rule.frozen:
        if name not in FREEZABLE:
            raise ConfigError(f"rule.frozen: the rule has no weights '{name}', expected some of {', '.join(FREEZABLE)}")
    if config.rule.frozen and config.outer.weight_decay:
        raise ConfigError(f"outer.weight_decay is {config.outer.weight_decay}, expected 0 with frozen weights")
    if config.inner.min_length < config.inner.truncation:
        raise ConfigError(
            f"inner.min_length is {config.inner.min_length}, expected at least inner.truncation ({config.inner.truncation}): "
            "one reset a truncation"
        )
    for part, low, high in (
        ("inner", "min_length", "max_length"),
        ("images", "min_scale", "max_scale"),
        ("text", "min_scale", "max_scale"),
    ):
        options = vars(getattr(config, part))
        if options[low] > options[high]:
            raise ConfigError(f"{part}.{low} is {options[low]}, expected at most {part}.{high} ({options[high]})")
    if config.checkpoint.every % config.log.every:
        raise ConfigError(
            f"checkpoint.every is {config.checkpoint.every}, expected a multiple of log.every ({config.log.every}): "
            "a line of metrics must not span a checkpoint"
        )
    if len(config.outer.betas) != 2:
        raise ConfigError(f"outer.betas is {config.outer.betas}, expected two numbers")


def dotted(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a nested configuration, or of a flat one that an earlier version wrote, by today's dotted names."""
    if not any(isinstance(value, dict) for value in tree.values()):
        options = {new: tree[old] for old, new in renamed(Config).items() if old in tree}
        return options | {"rule.frozen": [GROUP_OF.get(name, name) for name in options["rule.frozen"]]}
    return {f"{part}.{key}": value for part, options in tree.items() for key, value in options.items()}
