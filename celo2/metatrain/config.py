"""The configuration of a meta-training. The defaults are the published recipe (arXiv 2602.19142)."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from celo2 import rule as rules
from celo2.metatrain.tasks import TEXT
from celo2.rule import FIRST_LAYER, weight_shapes
from celo2.rule_files import LARGEST_FACTOR, load_rule
from celo2.training import configuration
from celo2.training.configuration import (
    DECAY,
    FRACTION,
    NOT_EMPTY,
    POSITIVE,
    ConfigError,
    Range,
    at_least,
    option,
    renamed,
    section,
)
from celo2.training.idle import Idle, refuse_idle

LARGEST = 2**16  # upper bound of options that determine how much memory an iteration needs
MOST = Range(f"at least 1 and at most {LARGEST}", lambda x: 1 <= x <= LARGEST)
POPULATION = Range(f"at least 4 and at most {LARGEST}", lambda x: 4 <= x <= LARGEST)
LENGTH = Range(f"at least 1 and at most {2**24}", lambda x: 1 <= x <= 2**24)  # length of an episode in steps
OUTER_LR = Range("at least 0 and at most 1e+30", lambda x: 0 <= x <= 1e30)  # AdamW's first step is ten times as long
PART = Range("above 0 and at most 1", lambda x: 0 < x <= 1)
HIDDEN = 8  # hidden units H of the rule's two layers
STEP_NUMBERS = 4  # numbers in θ for step sizes: three exponents, and the logarithm of the factor
WHITENING_NUMBERS = 1  # numbers in θ for whitening: log(rate / rate of the start rule)
GROUP_OF = {weight: group for group, weight in FIRST_LAYER.items()}
FREEZABLE = [GROUP_OF.get(weight, weight) for weight in weight_shapes(HIDDEN)]


@dataclass
class Run:
    dir: str = option(
        "runs/metatrain", "folder of the training run; the same command continues it", NOT_EMPTY, was="run_dir", path=True
    )
    seed: int = option(
        0, "random seed: every random number is a function of the seed, the iteration and the problem", at_least(0), was="seed"
    )


@dataclass
class Tasks:
    sources: list[str] = option(
        ["hub:mnist", "hub:fashion_mnist", "hub:cifar10", "hub:svhn"],
        "images: digits, hub:NAME, FILE.npz (all of its sets), FILE.npz:NAME; text: text:FILE, FILE a .txt, .jsonl, .jsonl.gz",
        NOT_EMPTY,
        was="tasks",
        path=True,
    )
    problems: int = option(8, "inner problems per task, each unrolled with both signs of ε", MOST, was="problems_per_task")


@dataclass
class Images:
    batch_size: int = option(64, "images per inner step", MOST, was="batch_size")
    lr: float = option(1e-3, "learning rate of matrices (celo2-base: of everything)", at_least(0), was="inner_lr")
    adam_lr: float = option(0.02, "learning rate of biases under Adam (celo2)", at_least(0), was="inner_adam_lr")
    min_scale: float = option(1e-3, "smallest s; s is log-uniform, the optimizer sees w / s", POSITIVE, was="min_scale")
    max_scale: float = option(1e3, "largest s", POSITIVE, was="max_scale")


@dataclass
class Text:
    layers: int = option(1, "blocks of the transformer", MOST, was="text_layers")
    width: int = option(32, "width of the transformer; its MLP is four times as wide", MOST)
    heads: int = option(1, "attention heads of the transformer", MOST)
    context: int = option(32, "sequence length in bytes", MOST)
    sequences: int = option(8, "sequences in a batch", MOST)
    also: list[str] = option(
        [], "further sizes, each trained on all texts: the options of `text` that differ, such as 'layers=2 width=64'"
    )
    lr: float = option(2e-3, "learning rate of hidden matrices (celo2-base: of everything)", at_least(0), was="text_lr")
    adam_lr: float = option(3e-3, "learning rate of embeddings and head under Adam (celo2)", at_least(0), was="text_adam_lr")
    min_scale: float = option(0.5, "smallest s; s multiplies the learning rate, too", POSITIVE, was="text_min_scale")
    max_scale: float = option(2.0, "largest s", POSITIVE, was="text_max_scale")


@dataclass
class Inner:
    truncation: int = option(50, "inner steps per outer iteration", LENGTH, was="truncation")
    min_length: int = option(100, "shortest episode in steps; lengths are log-uniform", LENGTH, was="min_length")
    max_length: int = option(2000, "longest episode in steps", LENGTH, was="max_length")
    staggered: bool = option(
        True,
        "problems start at ages spread over their episode; false: at 0, so that a truncation can be an episode",
        was="staggered",
    )
    schedule: Literal["constant", "cosine"] = option(
        "constant",
        "cosine: warm-up over 5 % of an episode, then down to inner.final; constant: as published",
        was="inner_schedule",
    )
    final: float = option(0.1, "final learning rate of the cosine, as a share of the peak", FRACTION)
    grad_clip: float | None = option(None, "clip the inner gradient of all weights to this norm; null: no clipping", POSITIVE)
    restart: float = option(
        1.0, "probability that an ended problem starts a new episode; otherwise it resumes from a saved late state", FRACTION
    )
    saved: int = option(2, "late states kept of each problem, if inner.restart is below 1", MOST)
    reparametrization: Literal["none", "global", "tensor", "parameter"] = option(
        "global",
        "weights that share one scale s: all of a problem (global), those of a tensor, or one each (parameter); none: no scales",
        was="reparametrization",
    )


@dataclass
class Rule:
    variant: Literal["celo2", "celo2-base"] = option(
        "celo2", "celo2: orthogonalized, Adam for biases, embeddings and head; celo2-base: the rule alone", was="variant"
    )
    init: str = option("random", "first θ: random, or a rule by name or path", NOT_EMPTY, was="init", path=True)
    init_noise: float = option(0.0, "standard deviation of normal noise on the first θ", at_least(0), was="init_noise")
    normalize_gradient: bool | None = option(
        None, "divide a gradient by its RMS before all else; null: as `init`; random: false", was="normalize_gradient"
    )
    odd: bool = option(False, "keep the rule odd: -g and -W give -u, as in optimizers set by hand; halves the free θ", was="odd")
    step_sizes: bool = option(False, "train the rule's step sizes, too: longer steps where the gradients of a matrix agree")
    step_bound: float | None = option(None, "upper bound of the step sizes; null: as `init`", at_least(1 / LARGEST_FACTOR))
    whitening: float | None = option(None, "how far whiteners move in a step; null: as `init`; 0: no whitening", FRACTION)
    train_whitening: bool = option(False, "train how far whiteners move in a step, too")
    decays: list[float] | None = option(
        None, "three decays, of the momenta and of the factored second moments; null: as `init`", DECAY
    )
    frozen: list[str] = option([], f"weights that keep their value in `init`: any of {', '.join(FREEZABLE)}", was="frozen")


@dataclass
class Estimator:
    sigma: float = option(0.01, "standard deviation σ of the perturbation ε; cma: its initial value", POSITIVE, was="sigma")
    last: float = option(0.1, "cma: share of an episode's steps, at its end, whose mean loss counts", PART)
    loss_clip: float | None = option(
        None, "inner losses count at most this many times the loss of a uniform guess; null: raw", POSITIVE, was="loss_clip"
    )
    scale_buckets: int = option(
        0,
        "number of buckets of log s: loss differences are divided by their running RMS per task and bucket; 0: not divided",
        at_least(0),
        was="scale_buckets",
    )


@dataclass
class Outer:
    method: Literal["pes", "cma"] = option(
        "pes", "pes: AdamW on PES gradients; cma: CMA-ES on the loss at the end of whole episodes, for few free numbers"
    )
    iterations: int = option(100_000, "outer iterations; with cma, generations", at_least(1), was="iterations")
    population: int | None = option(None, "cma: candidates in a generation; null: 4 + 3 ln n for n free numbers", POPULATION)
    lr: float = option(5e-5, "learning rate of AdamW (published: 5e-5 celo2, 1e-4 celo2-base)", OUTER_LR, was="outer_lr")
    betas: list[float] = option([0.9, 0.999], "decays of AdamW", DECAY, was="outer_betas")
    weight_decay: float = option(0.0, "decoupled weight decay of AdamW", at_least(0), was="outer_weight_decay")
    grad_clip: float | None = option(None, "clip the estimated gradient to this norm; null: no clipping", POSITIVE)
    warm_up: int = option(0, "iterations in which AdamW's learning rate rises linearly", at_least(0))
    schedule: Literal["constant", "cosine"] = option("constant", "schedule of AdamW's learning rate after the warm-up")
    final: float = option(0.1, "final learning rate of the cosine, as a share of outer.lr", FRACTION)
    average: float = option(0.0, "decay of the running mean of θ that becomes the rule; 0: the last θ", DECAY, was="average")


@dataclass
class Expert:
    rule: str | None = option(
        None,
        "rule (name or path, with the same accumulators) that guides the first iterations (ELO); null: none",
        path=True,
    )
    lr: float = option(2e-3, "learning rate of the expert, with the schedule of the trained rule", at_least(0))
    forcing: float = option(1.0, "initial share of the expert's step in every step; the rest is the trained rule's", FRACTION)
    direction: float = option(0.7, "initial weight of 1 - cosine of both steps in the meta-loss", FRACTION)
    size: float = option(0.3, "initial weight of the mean difference of their absolute values; the loss has the rest", FRACTION)
    begin: int = option(5_000, "outer iteration at which forcing and both weights begin to fall linearly", at_least(0))
    end: int = option(50_000, "outer iteration at which they reach 0", at_least(1))


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
    expert: Expert = section(Expert)
    engine: Engine = section(Engine)
    checkpoint: Checkpoint = section(Checkpoint)
    log: Log = section(Log)


# Options that may change when a run is resumed: they affect how long and where it runs, not what it computes.
FREE = {"run.dir", "outer.iterations", "engine.threads", "checkpoint.every", "checkpoint.snapshot_every", "log.every"}


def texts_of(config: Config) -> list[str]:
    """The sources that are texts."""
    return [source for source in config.tasks.sources if source.startswith(TEXT)]


def is_fast(config: Config) -> bool:
    """Whether the configuration selects the compiled engine."""
    return config.engine.name == "fast" or (config.engine.name == "auto" and config.engine.device == "cpu")


def of_method(method: str, *names: str) -> list[Idle]:
    """Entries of IDLE for options that only one outer method uses."""
    message = "is {value}, which outer.method={choice} does not use"
    return [Idle(name, "outer.method", lambda config: config.outer.method == method, message, detail=True) for name in names]


IDLE = (
    *of_method("cma", "outer.population", "estimator.last"),
    *of_method(
        "pes", "inner.truncation", "inner.staggered", "inner.restart", "estimator.scale_buckets", "outer.lr",
        "outer.betas", "outer.weight_decay", "outer.grad_clip", "outer.warm_up", "outer.schedule", "expert.rule",
    ),
    *(
        Idle(f"{section}.{part.name}", "tasks.sources", there, f"needs {what} in tasks.sources", detail=True)
        for section, kind, what, there in (
            ("images", Images, "images", lambda config: len(texts_of(config)) < len(config.tasks.sources)),
            ("text", Text, "a text", lambda config: bool(texts_of(config))),
        )
        for part in fields(kind)
    ),
    *(
        Idle(f"{section}.{key}", choice, acts, f"is {{value}}, which {choice}={{choice}} does not use", detail=True)
        for section in ("images", "text")
        for key, choice, acts in (
            ("adam_lr", "rule.variant", lambda config: config.rule.variant == "celo2"),
            ("min_scale", "inner.reparametrization", lambda config: config.inner.reparametrization != "none"),
            ("max_scale", "inner.reparametrization", lambda config: config.inner.reparametrization != "none"),
        )
    ),
    Idle("inner.final", "inner.schedule", lambda config: config.inner.schedule == "cosine", "needs inner.schedule=cosine"),
    Idle("inner.saved", "inner.restart", lambda config: config.inner.restart < 1, "needs inner.restart below 1"),
    Idle("outer.final", "outer.schedule", lambda config: config.outer.schedule == "cosine", "needs outer.schedule=cosine"),
    *(
        Idle(f"expert.{name}", "expert.rule", lambda config: config.expert.rule is not None, "needs expert.rule")
        for name in ("lr", "forcing", "direction", "size", "begin", "end")
    ),
)  # fmt: skip


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load the YAML file `path` with `section.key=value` overrides; the flat keys of earlier versions work too.

    Raises:
        ConfigError: see `configuration.load`; also options that contradict each other, or an option without effect.
    """
    config, written = configuration.load_written(Config, path, overrides)
    for name in config.rule.frozen:
        if name in GROUP_OF:
            print(f"note: '{name}' in rule.frozen is now '{GROUP_OF[name]}'", file=sys.stderr)
    config.rule.frozen = [GROUP_OF.get(name, name) for name in config.rule.frozen]
    check(config)
    for note in refuse_idle(config, IDLE, written):
        print(f"note: {note}", file=sys.stderr)
    config.rule.normalize_gradient = normalizes(config)
    return config


@functools.cache
def loaded(name: str) -> rules.Rule:
    """`load_rule(name)`, loaded only once: later changes of its file have no effect."""
    return load_rule(name)


def start_rule(config: Config) -> rules.Rule:
    """The rule in `rule.init`, with `rule.step_bound`, `rule.whitening` and `rule.decays` applied if they are set. For `random` a
    rule without weights, used for its settings."""
    found = rules.Rule({}) if config.rule.init == "random" else loaded(config.rule.init)
    if config.rule.step_bound is not None:
        found = replace(found, step_bound=config.rule.step_bound)
    if config.rule.whitening is not None:
        found = replace(found, whitening=config.rule.whitening)
    if config.rule.decays is None:
        return found
    first, second, third = config.rule.decays
    return replace(found, momentum_decays=(first, second, third), factored_decays=(first, second, third))


def theta_size(config: Config) -> int:
    """D, how many numbers θ has: the weights of a rule, and the numbers for step sizes and whitening."""
    return sum(math.prod(shape) for shape in weight_shapes(HIDDEN).values()) + STEP_NUMBERS + WHITENING_NUMBERS


def normalizes(config: Config) -> bool:
    """Whether the rule divides gradients by their RMS."""
    asked = config.rule.normalize_gradient
    return start_rule(config).normalize_gradient if asked is None else asked


def whitening(config: Config) -> float:
    """The whitening rate of the first θ (`celo2.whitening`); 0 for a rule without whitening."""
    return start_rule(config).whitening if config.rule.variant == "celo2" else 0.0


def step_bounds(config: Config) -> tuple[float, float]:
    """The upper bounds of step sizes: (of the trained rule, of its expert)."""
    expert = config.expert.rule
    return start_rule(config).step_bound, math.inf if expert is None else loaded(expert).step_bound


def text_sizes(config: Config) -> list[Text]:
    """The sizes of the transformers: the section `text` itself, and one variant of it for each entry of `text.also`."""
    kinds = {field.name: type(getattr(config.text, field.name)) for field in fields(Text) if field.name != "also"}
    sizes = [config.text]
    for entry in config.text.also:
        changes: dict[str, Any] = {}
        for word in entry.split():
            name, _, value = word.partition("=")
            if name not in kinds:
                raise ConfigError(f"text.also: '{word}' in '{entry}', expected NAME=NUMBER, NAME one of {', '.join(kinds)}")
            try:
                changes[name] = kinds[name](value)
            except ValueError:
                raise ConfigError(f"text.also: '{word}' in '{entry}', expected {name}={kinds[name].__name__}") from None
            if changes[name] == math.inf:
                raise ConfigError(f"text.also: '{word}' in '{entry}', expected a finite {name}")
            if not changes[name] > 0:
                raise ConfigError(f"text.also: '{word}' in '{entry}', expected {name} above 0")
            if kinds[name] is int and changes[name] > LARGEST:
                raise ConfigError(f"text.also: '{word}' in '{entry}', expected {name} of at most {LARGEST}")
        sizes.append(replace(config.text, **changes))
    for size in sizes:
        if size.width % size.heads:
            raise ConfigError(f"text.heads is {size.heads}, expected a divisor of text.width ({size.width})")
        if size.min_scale > size.max_scale:
            raise ConfigError(f"text.min_scale is {size.min_scale}, expected at most text.max_scale ({size.max_scale})")
    return sizes


def check(config: Config) -> None:
    """Raise ConfigError if options contradict each other."""
    if not config.tasks.sources:
        raise ConfigError("tasks.sources is empty, expected at least one data set")
    for name in config.rule.frozen:
        if name not in FREEZABLE:
            raise ConfigError(f"rule.frozen: the rule has no weights '{name}', expected some of {', '.join(FREEZABLE)}")
    if config.rule.frozen and config.outer.weight_decay:
        raise ConfigError(f"outer.weight_decay is {config.outer.weight_decay}, expected 0 with frozen weights")
    pes = config.outer.method == "pes"
    if pes and config.inner.min_length < config.inner.truncation:
        raise ConfigError(
            f"inner.min_length is {config.inner.min_length}, expected at least inner.truncation ({config.inner.truncation}): "
            "one reset a truncation"
        )
    if pes and config.inner.restart < 1 and config.inner.max_length <= config.inner.truncation:
        raise ConfigError(
            f"inner.restart is {config.inner.restart}, expected 1 where an episode is one truncation (inner.max_length "
            f"{config.inner.max_length}, inner.truncation {config.inner.truncation}): states are saved between truncations"
        )
    if config.expert.begin >= config.expert.end:
        raise ConfigError(f"expert.begin is {config.expert.begin}, expected below expert.end ({config.expert.end})")
    if config.expert.direction + config.expert.size > 1:
        raise ConfigError(
            f"expert.direction is {config.expert.direction} and expert.size {config.expert.size}, expected a sum of at most 1"
        )
    text_sizes(config)
    for part, low, high in (("inner", "min_length", "max_length"), ("images", "min_scale", "max_scale")):
        options = vars(getattr(config, part))
        if options[low] > options[high]:
            raise ConfigError(f"{part}.{low} is {options[low]}, expected at most {part}.{high} ({options[high]})")
    if config.checkpoint.every % config.log.every:
        raise ConfigError(
            f"checkpoint.every is {config.checkpoint.every}, expected a multiple of log.every ({config.log.every}): "
            "a line of metrics must not span a checkpoint"
        )
    if config.outer.weight_decay and not config.rule.step_sizes and start_rule(config).has_step_sizes:
        raise ConfigError(
            f"outer.weight_decay is {config.outer.weight_decay}, expected 0 where rule.init has step sizes that are not trained "
            "(rule.step_sizes=false)"
        )
    if config.rule.step_bound is not None and not (config.rule.step_sizes or start_rule(config).has_step_sizes):
        raise ConfigError(f"rule.step_bound is {config.rule.step_bound}, expected null: the rule has no step sizes")
    if config.rule.variant == "celo2-base" and start_rule(config).whitening:
        whitened = "rule.init has whitening" if config.rule.whitening is None else f"rule.whitening is {config.rule.whitening}"
        raise ConfigError(f"rule.variant is celo2-base, expected celo2: {whitened}, a part of orthogonalization")
    if config.rule.train_whitening and not whitening(config):
        remedy = "" if config.rule.variant == "celo2-base" else "; rule.whitening=0.1 would give it one"
        raise ConfigError(f"rule.train_whitening is true, expected false: the rule has no whitening{remedy}")
    if config.rule.decays is not None and len(config.rule.decays) != 3:
        raise ConfigError(f"rule.decays is {config.rule.decays}, expected three numbers")
    if len(config.outer.betas) != 2:
        raise ConfigError(f"outer.betas is {config.outer.betas}, expected two numbers")


def dotted(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a nested configuration, or of a flat one from an earlier version, by their current dotted names."""
    if not any(isinstance(value, dict) for value in tree.values()):
        options = {new: tree[old] for old, new in renamed(Config).items() if old in tree}
        return options | {"rule.frozen": [GROUP_OF.get(name, name) for name in options["rule.frozen"]]}
    return {f"{part}.{key}": value for part, options in tree.items() for key, value in options.items()}
