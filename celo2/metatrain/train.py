"""The outer loop: perturb θ, unroll, estimate the gradient, AdamW. It logs, checkpoints, and resumes exactly.

run.dir/config.yaml                  the configuration as resolved
run.dir/metrics.jsonl                one JSON object per `log.every` iterations
run.dir/state.safetensors            the whole meta-state
run.dir/rules/00002000.safetensors   the rule every `checkpoint.snapshot_every` iterations
run.dir/rule.safetensors             the rule at the last checkpoint
run.dir/curve.png
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from celo2.metatrain import pes
from celo2.metatrain.config import FREE, Config, ConfigError, dotted
from celo2.metatrain.engine import choose_unroll
from celo2.metatrain.families import Arrays, family_of
from celo2.metatrain.problems import NOISE, Problems, random
from celo2.metatrain.tasks import Data, load_data
from celo2.metatrain.theta import SIZE, first_theta, free, odd_part, rule_of
from celo2.rule import Rule
from celo2.rule_files import save_rule
from celo2.training.configuration import to_yaml
from celo2.training.metrics import read_metrics, rewind

FORMAT = "celo2-metatrain"


class MetaTraining:
    """The whole meta-state, and one outer iteration.

    `data`: what `load_data` returned. Its problems, losses and ε are in that order.

    Attributes:
        theta: (347,) the rule's weights, a parameter of the outer AdamW.
        average: (347,) their running mean; equal to them without averaging.
        xi: (N, 347) the sum of ε of each problem since it started.
        problems, unrolls: the problems of each family, and the engine that advances them.
        tasks: the names of all tasks. task, uniform_loss: of each problem (N,), its task and the loss of a uniform guess.
        buckets: running scale of the loss differences, or None.
    """

    def __init__(self, config: Config, *data: Data) -> None:
        self.config = config
        self.iteration, self.seconds = 0, 0.0
        self.theta = torch.nn.Parameter(torch.from_numpy(first_theta(config)))
        self.average = self.theta.detach().numpy().copy()
        outer = config.outer
        self.outer = torch.optim.AdamW(
            [self.theta], lr=outer.lr, betas=(outer.betas[0], outer.betas[1]), weight_decay=outer.weight_decay
        )
        self.outer.state[self.theta] = {"step": torch.zeros(())} | {
            key: torch.zeros_like(self.theta) for key in ("exp_avg", "exp_avg_sq")
        }
        self.problems: list[Problems] = []
        self.unrolls = [choose_unroll(config) for _ in data]
        self.tasks = [name for found in data for name in found.names]
        for found in data:
            first_number = sum(len(problems.task) for problems in self.problems)
            self.problems.append(Problems(config, family_of(config, found), first_number))
        self.task = np.repeat(np.arange(len(self.tasks)), config.tasks.problems)
        self.uniform_loss = np.concatenate([np.full(len(p.task), p.family.uniform_loss) for p in self.problems])
        self.xi = np.zeros((len(self.task), SIZE))
        self.buckets = (
            pes.BucketScale(len(self.tasks) * config.estimator.scale_buckets) if config.estimator.scale_buckets else None
        )

    def step(self) -> dict[str, float]:
        """One outer iteration; returns its metrics."""
        start, config = time.monotonic(), self.config
        streams = [random(config.run.seed, NOISE, self.iteration, n) for n in range(len(self.task))]
        noise = np.stack([stream.standard_normal(SIZE) for stream in streams])
        if config.rule.odd:
            noise = math.sqrt(2) * odd_part(noise)  # its deviation is 1 again
        theta = self.theta.detach().numpy()
        # ε is what float32 makes of it, so that θ + ε and θ - ε lie where the estimate believes.
        epsilon = (config.estimator.sigma * free(config) * noise).astype(np.float32)
        bucket = np.concatenate([self.bucket(problems) for problems in self.problems])
        raw, reset_at = self.advance(pes.antithetic(theta, epsilon))

        finite, uniform = np.isfinite(raw), np.repeat(self.uniform_loss, 2)[:, None]
        if config.estimator.loss_clip is None:  # a pair with a loss that is not finite says nothing
            losses = np.where(np.repeat(finite[0::2] & finite[1::2], 2, axis=0), raw, 0.0)
        else:
            bound = (config.estimator.loss_clip * uniform).astype(np.float32)
            losses = np.minimum(np.where(finite, raw, bound), bound)
        before, after = pes.differences(losses, reset_at)
        xi = self.xi + epsilon
        weight = np.ones(len(self.task))
        if self.buckets is not None:
            weight = self.buckets.weights(bucket, before + after)
        gradient = pes.estimate(before, after, xi, epsilon, config.estimator.sigma, weight)
        self.xi = pes.persisted(xi, epsilon, reset_at, config.inner.truncation)
        self.theta.grad = torch.from_numpy(gradient.astype(np.float32))
        self.outer.step()
        self.iteration += 1
        decay = min(config.outer.average, 1 - 1 / self.iteration)
        self.average = decay * self.average + (1 - decay) * self.theta.detach().numpy()
        self.seconds += time.monotonic() - start

        clipped = np.minimum(losses, uniform.astype(np.float32))
        per_task = clipped.mean(1).reshape(len(self.tasks), -1).mean(1)
        return {
            "loss": float(clipped.mean()),
            **{f"loss/{name}": float(x) for name, x in zip(self.tasks, per_task, strict=True)},
            "gradient_norm": float(np.linalg.norm(gradient)),
            "theta_norm": float(self.theta.detach().norm()),
            "not_finite": float(1 - finite.mean()),
        }

    def advance(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The next truncation of every problem under θ (2N, 347): inner losses (2N, T), and where problems start again (N,)."""
        losses, resets = [], []
        for problems, unroll in zip(self.problems, self.unrolls, strict=True):
            truncation = problems.truncation(self.iteration)
            own = theta[2 * problems.number[0] : 2 * problems.number[-1] + 2]
            losses.append(unroll(self.config, problems.family, problems.state, own, truncation))
            resets.append(truncation.reset_at)
        return np.concatenate(losses), np.concatenate(resets)

    def bucket(self, problems: Problems) -> np.ndarray:
        """The bucket of each of the problems: by task, and by its scale's place between the smallest and the largest."""
        count, options = self.config.estimator.scale_buckets, problems.family.options
        low, high = math.log(options.min_scale), math.log(options.max_scale)
        first = self.task[problems.number] * count
        if self.config.inner.reparametrization != "global" or high == low:
            return first
        scale = next(iter(problems.scale.values())).reshape(len(first), -1)[:, 0]
        place = np.clip(((np.log(scale) - low) / (high - low) * count).astype(np.int64), 0, count - 1)
        return first + place

    def rule(self) -> Rule:
        """The rule as it stands, with a description that says how it came about."""
        config = self.config
        data = ", ".join(self.tasks)
        start = f"seed {config.run.seed}, from {config.rule.init}"
        text = f"meta-trained: {self.iteration} iterations on {data}; {start}; celo2.metatrain"
        return rule_of(self.average if config.outer.average else self.theta.detach().numpy(), config, text)

    def tensors(self) -> Arrays:
        """Every array of the meta-state by name; what is written into one changes the meta-state."""
        adam = {f"outer.{key}": x.numpy() for key, x in self.outer.state[self.theta].items()}
        buckets = {f"buckets.{key}": x for key, x in vars(self.buckets).items()} if self.buckets is not None else {}
        problems = {key: x for part in self.problems for key, x in part.tensors().items()}
        own = {"theta": self.theta.detach().numpy(), "average": self.average, "xi": self.xi}
        return own | adam | buckets | problems

    def save(self, path: Path) -> None:
        """Write the meta-state; a kill at any moment leaves the old file or the new one, whole."""
        meta = {"iteration": self.iteration, "seconds": self.seconds, "config": asdict(self.config)}
        payload = save({key: np.array(x, order="C") for key, x in self.tensors().items()}, {FORMAT: json.dumps(meta)})
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a file of `save`.

        Raises:
            ConfigError: not such a file, or one of another configuration.
        """
        try:
            with safe_open(path, "numpy") as file:
                meta = json.loads((file.metadata() or {})[FORMAT])
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ConfigError(f"{path}: not a meta-training state ({type(error).__name__}: {error})") from None
        written = dotted(meta["config"])
        for key, value in dotted(asdict(self.config)).items():
            if key not in FREE and written.get(key) != value:
                raise ConfigError(f"{path} was written with {key} {written.get(key)!r}, now it is {value!r}")
        own = self.tensors()
        if {k: x.shape for k, x in own.items()} != {k: x.shape for k, x in arrays.items()}:
            raise ConfigError(f"{path}: its arrays are not those of this configuration")
        self.iteration, self.seconds = meta["iteration"], meta["seconds"]
        for key, x in own.items():
            x[...] = arrays[key]


def run(config: Config, show: Callable[[int, dict[str, float]], None]) -> Path:
    """Meta-train, or continue, to `outer.iterations`; `show` gets each record of the metrics. Returns the path of the rule."""
    folder = Path(config.run.dir)
    training = MetaTraining(config, *load_data(config.tasks.sources))
    try:
        (folder / "rules").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir '{folder}': {error.strerror}") from None
    state, metrics, rule_path = folder / "state.safetensors", folder / "metrics.jsonl", folder / "rule.safetensors"
    if state.exists():
        training.load(state)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    rewind(metrics, lambda record: record["iteration"] <= training.iteration)

    recent: list[dict[str, float]] = []
    while training.iteration < config.outer.iterations:
        recent.append(training.step())
        i, last = training.iteration, training.iteration == config.outer.iterations
        if i % config.log.every == 0 or last:
            means = {key: float(np.mean([r[key] for r in recent])) for key in recent[0]}
            record = {"iteration": i, "seconds": round(training.seconds, 3), **means}
            recent = []
            with metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            show(i, record)
        if i % config.checkpoint.snapshot_every == 0 or last:
            save_rule(training.rule(), folder / "rules" / f"{i:08d}.safetensors")
        if i % config.checkpoint.every == 0 or last:
            training.save(state)
            save_rule(training.rule(), rule_path)
    draw(read_metrics(metrics), folder / "curve.png")
    return rule_path


def draw(records: list[dict[str, float]], path: Path) -> None:
    """The mean inner loss of each task over the iterations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key in (k for k in records[0] if k.startswith("loss")):
        width = 2 if key == "loss" else 1
        axes.plot(
            [r["iteration"] for r in records], [r[key] for r in records], linewidth=width, label=key.partition("/")[2] or "all"
        )
    axes.set(xlabel="outer iteration", ylabel="inner training loss, at most that of a uniform guess")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
