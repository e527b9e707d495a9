"""What every meta-training has, whichever method searches for θ: problems, engines, the current rule, and the state in a file."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from celo2.distributed.plan import fingerprint
from celo2.metatrain.config import FREE, Config, ConfigError, dotted, loaded, start_rule
from celo2.metatrain.engine import choose_unroll
from celo2.metatrain.families import Arrays, families_of
from celo2.metatrain.tasks import Data
from celo2.metatrain.theta import SIZE, STARTS, STEP, WHITENING, first_theta, rule_of
from celo2.rule import Rule
from celo2.training.atomic import write_atomically

FORMAT = "celo2-metatrain"
SEARCHED = ("theta", "average", "xi", "cma")  # arrays, or prefixes of their names, that stay finite unless the search diverges


def extended(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """x (..., D) of a state from before θ had step sizes or whitening, extended to `shape` with zeros for them."""
    if x.ndim and shape[-1:] == (SIZE,) and x.shape[:-1] == shape[:-1] and x.shape[-1] in (STARTS[STEP], STARTS[WHITENING]):
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, SIZE - x.shape[-1])])
    return x


class MetaState(ABC):
    """The meta-state, and one outer iteration.

    `data`: what `load_data` returned. Families are in this order, and problems, losses and ε in the order of the families.

    Attributes:
        families, unrolls: one family for each kind and size of problem, and the engine that advances it.
        tasks: the names of all tasks, all different.
        task, uniform_loss: of each problem (N,), its task and the loss of a uniform guess.
        average: (D,) the running mean of θ; equal to θ without averaging.
        iteration, seconds: outer iterations done, and the time they took.
        data: a digest of the examples of each task, by the task's name without a size.

    Raises:
        ConfigError: two tasks have the same name, or the start or the engine cannot be used.
    """

    def __init__(self, config: Config, *data: Data) -> None:
        self.config = config
        self.iteration, self.seconds = 0, 0.0
        self.first_theta = first_theta(config)
        self.average = self.first_theta.copy()
        self.families = [family for found in data for family in families_of(config, found)]
        self.unrolls = [choose_unroll(config) for _ in self.families]
        self.tasks = [f"{name}{family.label}" for family in self.families for name in family.data.names]
        if twice := [name for name in self.tasks if self.tasks.count(name) > 1]:
            remedy = "rename a file or a data set of tasks.sources, or name it and each size of text.also once"
            raise ConfigError(f"two tasks are named '{twice[0]}', expected different names: {remedy}")
        self.data = {name: digest for found in data for name, digest in found.digests().items()}
        self.task = np.repeat(np.arange(len(self.tasks)), config.tasks.problems)
        counts = [len(family.data.names) * config.tasks.problems for family in self.families]
        self.first_numbers = [sum(counts[:k]) for k in range(len(counts))]  # of the first problem of each family
        self.uniform_loss = np.repeat([family.uniform_loss for family in self.families], counts)

    @abstractmethod
    def search(self) -> dict[str, float]:
        """Change θ as an iteration does; returns the metrics."""

    @abstractmethod
    def current(self) -> np.ndarray:
        """θ (D,), float32."""

    @abstractmethod
    def tensors(self) -> Arrays:
        """Every array of the meta-state by name; writing into one changes the meta-state."""

    def step(self) -> dict[str, float]:
        """One outer iteration; returns its metrics.

        Raises:
            ConfigError: θ is not finite after it.
        """
        start = time.monotonic()
        metrics = self.search()
        self.iteration += 1
        if not np.isfinite(self.current()).all():
            remedy = "take a smaller outer.lr, an estimator.loss_clip or an outer.grad_clip"
            raise ConfigError(f"θ is not finite after iteration {self.iteration}: {remedy}, in another run.dir")
        decay = min(self.config.outer.average, 1 - 1 / self.iteration)
        self.average = decay * self.average + (1 - decay) * self.current()
        self.seconds += time.monotonic() - start
        return metrics

    def bounded(self, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses (U, T), at most what `estimator.loss_clip` allows; and for the metrics, at most the loss of a uniform guess,
        which also stands for a loss that is not finite."""
        uniform = np.repeat(self.uniform_loss, len(raw) // len(self.task))[:, None]
        clip = self.config.estimator.loss_clip
        bound = (np.full_like(uniform, np.inf) if clip is None else clip * uniform).astype(np.float32)
        losses = np.minimum(np.where(np.isfinite(raw), raw, bound), bound)
        return losses, np.minimum(losses, uniform.astype(np.float32))

    def means(self, losses: np.ndarray) -> dict[str, float]:
        """The metrics of losses (U, T) of all problems, NaN where they do not count: means over all, and over each task."""
        per_task = np.nanmean(losses, 1).reshape(len(self.tasks), -1).mean(1)
        return {"loss": float(np.nanmean(losses)), **{f"loss/{n}": float(x) for n, x in zip(self.tasks, per_task, strict=True)}}

    def rule(self) -> Rule:
        """The current rule, with a description of how it was trained."""
        config = self.config
        data = ", ".join(self.tasks)
        start = f"seed {config.run.seed}, from {config.rule.init}"
        text = f"meta-trained: {self.iteration} iterations on {data}; {start}; celo2.metatrain"
        return rule_of(self.average if config.outer.average else self.current(), config, text)

    def save(self, path: Path) -> None:
        """Write the meta-state; a kill at any moment leaves the old file or the new one, whole."""
        meta = {"iteration": self.iteration, "seconds": self.seconds, "config": asdict(self.config)}
        meta |= {"data": self.data, "start": fingerprint(start_rule(self.config), None), "expert": self.expert_fingerprint()}
        arrays = {key: np.array(x, order="C") for key, x in self.tensors().items()}
        write_atomically(path, save(arrays, {FORMAT: json.dumps(meta)}))

    def expert_fingerprint(self) -> str | None:
        """A hash of the rule in `expert.rule`, or None."""
        name = self.config.expert.rule
        return None if name is None else fingerprint(loaded(name), None)

    def load(self, path: Path) -> None:
        """Resume from a file of `save`.

        Raises:
            ConfigError: it is no such file, has another configuration, data or rules, or is of a search that diverged.
        """
        meta, arrays = read_state(path)
        self.require_same(path, meta)
        own = self.tensors()
        arrays = {key: extended(x, own[key].shape) if key in own else x for key, x in arrays.items()}
        if {k: x.shape for k, x in own.items()} != {k: x.shape for k, x in arrays.items()}:
            raise ConfigError(f"{path}: its arrays are not those of this configuration")
        for key, x in arrays.items():
            if key.partition(".")[0] in SEARCHED and not np.isfinite(x).all():
                raise ConfigError(f"{path}: {key} is not finite, as after a search that diverged: begin in another run.dir")
        self.iteration, self.seconds = meta["iteration"], meta["seconds"]
        for key, x in own.items():
            x[...] = arrays[key]

    def require_same(self, path: Path, meta: dict[str, Any]) -> None:
        """Raise ConfigError if this run cannot resume the run that wrote `meta` into `path`.

        Earlier versions wrote neither the data nor the expert nor, at first, the start.
        """
        other = "or begin in another run.dir"
        written = dotted(asdict(Config())) | dotted(meta["config"])  # options newer than the file get their defaults
        start = start_rule(self.config)
        bound = {"outer.iterations"} if self.config.outer.schedule == "cosine" else set()
        for key, value in dotted(asdict(self.config)).items():
            if key not in FREE - bound and written[key] != value:
                again = written[key] if isinstance(written[key], str) else json.dumps(written[key])
                raise ConfigError(
                    f"{path} was written with {key} {written[key]!r}, now it is {value!r}: write {key}={again} again, {other}"
                )
        if meta["iteration"] > self.config.outer.iterations:
            done = meta["iteration"]
            raise ConfigError(
                f"outer.iterations is {self.config.outer.iterations}, expected at least {done}, which {path} has done"
            )
        if meta.get("start", fingerprint(start, None)) != fingerprint(start, None):
            raise ConfigError(
                f"{path} was written with another rule in rule.init, '{self.config.rule.init}': use that rule again, {other}"
            )
        if "start" not in meta and start.whitening:  # no rule had whitening when it was written
            raise ConfigError(f"{path} was written before rules had whitening, and rule.init has it: begin in another run.dir")
        if meta.get("expert", self.expert_fingerprint()) != self.expert_fingerprint():
            raise ConfigError(
                f"{path} was written with another rule in expert.rule, '{self.config.expert.rule}': use that rule again, {other}"
            )
        if changed := [name for name, digest in self.data.items() if meta.get("data", self.data).get(name) != digest]:
            raise ConfigError(
                f"{path} was written with other data of {', '.join(changed)} in tasks.sources: use that data again, {other}"
            )


def read_state(path: Path) -> tuple[dict[str, Any], Arrays]:
    """What `MetaState.save` wrote: metadata and arrays.

    Raises:
        ConfigError: it is no such file, or damaged.
    """
    try:
        with safe_open(path, "numpy") as file:
            meta = json.loads((file.metadata() or {})[FORMAT])
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        dotted(meta["config"])
        if type(meta["iteration"]) is not int or meta["iteration"] < 0:
            raise ValueError(f"iteration {meta['iteration']!r}")
        if not isinstance(meta["seconds"], int | float) or not isinstance(meta.get("data", {}), dict):
            raise ValueError("seconds or data of the wrong type")
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a meta-training state ({type(error).__name__}: {error})") from None
    return meta, arrays
