"""Meta-training, from its first iteration or its last checkpoint to its last iteration; and PES with AdamW, one of its methods.

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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from celo2.metatrain import pes
from celo2.metatrain.config import Config, ConfigError, text_sizes
from celo2.metatrain.engine import Expert
from celo2.metatrain.families import Arrays
from celo2.metatrain.generations import Generations
from celo2.metatrain.outer import MetaState
from celo2.metatrain.problems import NOISE, Problems, random
from celo2.metatrain.tasks import Data, load_data
from celo2.metatrain.theta import SIZE, expert_theta, free, odd_noise, within_bounds
from celo2.rule import Rule
from celo2.rule_files import save_rule
from celo2.training.atomic import write_atomically
from celo2.training.configuration import to_yaml
from celo2.training.folder import RULE, check_own
from celo2.training.metrics import finite, read_metrics, rewind
from celo2.training.schedule import cosine

STATE = "state.safetensors"


class PESTraining(MetaState):
    """PES with AdamW: perturb θ, unroll a truncation, estimate the gradient, update θ.

    Attributes:
        theta: (352,), a parameter of `adamw`.
        xi: (N, 352) the sum of ε of each problem since it started.
        problems: of each family.
        buckets: running scale of the loss differences, or None.
        expert: (352,) θ of the rule that helps at first, or None.
    """

    def __init__(self, config: Config, *data: Data) -> None:
        super().__init__(config, *data)
        self.theta = torch.nn.Parameter(torch.from_numpy(self.first_theta.copy()))
        outer = config.outer
        self.adamw = torch.optim.AdamW(
            [self.theta], lr=outer.lr, betas=(outer.betas[0], outer.betas[1]), weight_decay=outer.weight_decay
        )
        self.adamw.state[self.theta] = {"step": torch.zeros(())} | {
            key: torch.zeros_like(self.theta) for key in ("exp_avg", "exp_avg_sq")
        }
        numbered = zip(self.families, self.first_numbers, strict=True)
        self.problems = [Problems(config, family, first_number) for family, first_number in numbered]
        self.xi = np.zeros((len(self.task), SIZE))
        self.buckets = (
            pes.BucketScale(len(self.tasks) * config.estimator.scale_buckets) if config.estimator.scale_buckets else None
        )
        self.expert = expert_theta(config)

    def current(self) -> np.ndarray:
        return self.theta.detach().numpy()

    def search(self) -> dict[str, float]:
        config = self.config
        epsilon, buckets = self.perturbations(), self.of_buckets()
        share = pes.fallen(1.0, self.iteration, config.expert.begin, config.expert.end)
        raw, reset_at, resumed, terms = self.advance(pes.antithetic(self.current(), epsilon), share)
        finite_losses = np.isfinite(raw)
        losses, shown = self.bounded(raw)
        if config.estimator.loss_clip is None:  # a pair with a loss that is not finite says nothing
            losses = np.where(np.repeat(finite_losses[0::2] & finite_losses[1::2], 2, axis=0), losses, 0.0)
        if terms is not None:
            losses = pes.with_imitation(losses, terms, (share * config.expert.direction, share * config.expert.size))
        gradient = self.estimate(losses, reset_at, epsilon, resumed, buckets)
        norm = float(np.linalg.norm(gradient))
        if config.outer.grad_clip is not None and norm > config.outer.grad_clip:
            gradient *= config.outer.grad_clip / norm
        self.update(gradient)
        return self.means(shown) | {
            "gradient_norm": norm,
            "theta_norm": float(self.theta.detach().norm()),
            "not_finite": float(1 - finite_losses.mean()),
        }

    def perturbations(self) -> np.ndarray:
        """ε (N, 352) of every problem, rounded to float32, so that the estimate uses the same ε as θ + ε and θ - ε."""
        streams = [random(self.config.run.seed, NOISE, self.iteration, n) for n in range(len(self.task))]
        noise = np.stack([stream.standard_normal(SIZE) for stream in streams])
        if self.config.rule.odd:
            noise = odd_noise(noise)
        return (self.config.estimator.sigma * free(self.config) * noise).astype(np.float32)

    def estimate(
        self, losses: np.ndarray, reset_at: np.ndarray, epsilon: np.ndarray, resumed: np.ndarray, buckets: np.ndarray
    ) -> np.ndarray:
        """The gradient (352,) from the losses (2N, T) of a truncation; updates ξ for the next one.

        reset_at (N,) and resumed (N, 352) are of `advance`; buckets (N,) are those before the truncation.
        """
        steps = self.config.inner.truncation
        before, after = pes.differences(losses, reset_at)
        xi, xi_after = self.xi + epsilon, epsilon + resumed
        weights = np.ones((2, len(self.task)))
        if self.buckets is not None:  # each part with the scale that it ran with
            parts = np.stack([reset_at > 0, reset_at < steps])
            weights = self.buckets.weights(np.stack([buckets, self.of_buckets()]), np.stack([before, after]), parts)
        self.xi = pes.persisted(xi, xi_after, reset_at, steps)
        return pes.estimate(before, after, xi, xi_after, self.config.estimator.sigma, weights)

    def update(self, gradient: np.ndarray) -> None:
        """One step of AdamW with the gradient (352,); θ stays within the bounds of a rule."""
        self.theta.grad = torch.from_numpy(gradient.astype(np.float32))
        self.adamw.param_groups[0]["lr"] = self.config.outer.lr * outer_rate(self.config, self.iteration)
        self.adamw.step()
        self.theta.data.copy_(torch.from_numpy(within_bounds(self.current(), self.config)))

    def advance(self, theta: np.ndarray, share: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Run the next truncation of every problem under θ (2N, 352); `share` scales the forcing of an expert.

        Returns:
            inner losses (2N, T), the steps (N,) at which problems start again, the ξ (N, 352) of the late states from which they
            resume, and the imitation terms (2N, T, 2), or None if no expert helps.
        """
        losses, resets, terms = [], [], []
        resumed = np.zeros_like(self.xi)
        for problems, unroll in zip(self.problems, self.unrolls, strict=True):
            here = slice(problems.number[0], problems.number[-1] + 1)
            truncation = problems.truncation(self.iteration, self.xi[here])
            own = theta[2 * here.start : 2 * here.stop]
            expert = None
            if self.expert is not None and share > 0:
                of_steps = np.zeros((len(own), self.config.inner.truncation, 2), np.float32)
                expert = Expert(self.expert, share * self.config.expert.forcing, of_steps)
                terms.append(of_steps)
            losses.append(unroll(self.config, problems.family, problems.state, own, truncation, expert))
            resets.append(truncation.reset_at)
            if truncation.xi is not None:
                resumed[here] = truncation.xi
        return np.concatenate(losses), np.concatenate(resets), resumed, np.concatenate(terms) if terms else None

    def of_buckets(self) -> np.ndarray:
        """The bucket (N,) of every problem."""
        return np.concatenate([self.bucket(problems) for problems in self.problems])

    def bucket(self, problems: Problems) -> np.ndarray:
        """The bucket of each problem: by its task, and by the place of its scale between the smallest and the largest."""
        count, options = self.config.estimator.scale_buckets, problems.family.options
        low, high = math.log(options.min_scale), math.log(options.max_scale)
        first = self.task[problems.number] * count
        if self.config.inner.reparametrization != "global" or high == low:
            return first
        scale = next(iter(problems.scale.values())).reshape(len(first), -1)[:, 0]
        place = np.clip(((np.log(scale) - low) / (high - low) * count).astype(np.int64), 0, count - 1)
        return first + place

    def tensors(self) -> Arrays:
        """Every array of the meta-state by name; writing into one changes the meta-state."""
        adam = {f"outer.{key}": x.numpy() for key, x in self.adamw.state[self.theta].items()}
        buckets = {f"buckets.{key}": x for key, x in vars(self.buckets).items()} if self.buckets is not None else {}
        problems = {key: x for part in self.problems for key, x in part.tensors().items()}
        own = {"theta": self.theta.detach().numpy(), "average": self.average, "xi": self.xi}
        return own | adam | buckets | problems


def outer_rate(config: Config, iteration: int) -> float:
    """The factor on AdamW's learning rate at an iteration (from 0): a linear warm-up, then constant or a cosine."""
    outer = config.outer
    if iteration < outer.warm_up:
        return (iteration + 1) / outer.warm_up
    if outer.schedule == "constant":
        return 1.0
    return cosine((iteration - outer.warm_up) / max(1, outer.iterations - outer.warm_up), outer.final)


def training_of(config: Config, *data: Data) -> MetaState:
    """The meta-training by `outer.method`."""
    return (Generations if config.outer.method == "cma" else PESTraining)(config, *data)


def save_whole(rule: Rule, path: Path) -> None:
    """Write a rule; a kill at any moment leaves the old file or the new one."""
    temporary = path.with_name(f"tmp_{path.name}")
    save_rule(rule, temporary)
    temporary.replace(path)


def run(config: Config, show: Callable[[int, dict[str, float]], None]) -> Path:
    """Meta-train, or resume, until `outer.iterations`; `show` gets each record of the metrics. Returns the path of the rule.

    Raises:
        ConfigError: tasks, the start, the engine or the folder cannot be used, the state is of another run, or θ is not finite.
        RuleError: a rule cannot be read.
        UnsafeFolder: the folder holds files that are not of a meta-training, and would be replaced.
        OSError: the folder cannot be written.
    """
    folder = Path(config.run.dir)
    check_own(folder, Config, "iteration", STATE)
    training = training_of(config, *load_data(config.tasks.sources, max(size.context for size in text_sizes(config))))
    try:
        (folder / "rules").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir '{folder}': {error.strerror}") from None
    state, metrics, rule_path = folder / STATE, folder / "metrics.jsonl", folder / RULE
    if state.exists():
        training.load(state)
    write_atomically(folder / "config.yaml", to_yaml(config).encode())
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
                file.write(json.dumps({key: finite(value) for key, value in record.items()}) + "\n")
            show(i, record)
        if i % config.checkpoint.snapshot_every == 0 or last:
            save_whole(training.rule(), folder / "rules" / f"{i:08d}.safetensors")
        if i % config.checkpoint.every == 0 or last:
            training.save(state)
            save_whole(training.rule(), rule_path)
    draw(read_metrics(metrics), folder / "curve.png")
    return rule_path


def draw(records: list[dict[str, float]], path: Path) -> None:
    """Draw the mean inner loss of each task over the iterations; do nothing if a finished run has lost its metrics."""
    if not records:
        return
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
