"""A ladder of model sizes and budgets: its rungs, and the data speedups that it shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from configs.length import batch_sizes
from configs.load import ConfigError, load_config
from configs.schema import Config
from data.batch_sizes import BatchSizes
from launch.compare.curves import Run
from launch.compare.speedup import Cell, Speedup, Speedups, why_no_fit
from launch.run.setup import build_from_config, open_data, vocabulary
from models.sizes import SIZES

REFERENCE = "adamw"  # whose fit the speedups are measured against
FEWEST_STEPS = 20
BEYOND = ("gpt3-125m", "gpt3-1.3b")  # sizes that a ladder on CPUs does not run, for which the report states the trend
WIDEST = 10  # a trend whose interval spans a larger factor says nothing
MISFIT = 0.005  # nats; a fit that misses the reference's means by more is named
SHAPE = ("layers", "width", "heads", "hf", "init", "size")  # what --sizes sets, or overrules


@dataclass(frozen=True)
class Rung:
    """One model size and budget."""

    size: str
    ratio: float  # tokens per weight, as asked for
    weights: int
    width: int
    steps: int
    tokens: int  # of its steps, with their batch sizes (train.ramp)
    epochs: float  # passes over the training data

    @property
    def name(self) -> str:
        """For folders and people."""
        return f"{self.size}_{self.ratio:g}"

    @property
    def text(self) -> str:
        """The same in words."""
        return f"{self.size} at {self.ratio:g} tokens per weight"

    @property
    def overrides(self) -> list[str]:
        """The overrides that make a training run one of this rung."""
        return [f"model.size={self.size}", f"train.steps={self.steps}"]


def rungs_of(file: str, overrides: Sequence[str], sizes: Sequence[str], ratios: Sequence[float]) -> list[Rung]:
    """All rungs, sizes ascending, and within them the ratios ascending.

    Raises:
        ConfigError: sizes or ratios that are unknown, not ascending or too few steps; or a model that --sizes would contradict.
    """
    for size in sizes:
        if size not in SIZES:
            raise ConfigError(f"--sizes {size}: unknown; sizes are {', '.join(SIZES)}")
    if list(ratios) != sorted(set(ratios)) or not all(0 < ratio < math.inf for ratio in ratios):
        said = " ".join(f"{ratio:g}" for ratio in ratios)
        raise ConfigError(f"--tokens-per-parameter {said}: expected positive numbers, each larger than the one before")
    config = load_config(file, overrides)
    for key in SHAPE:
        if getattr(config.model, key) is not None and key != "size":
            raise ConfigError(f"--sizes gives the model its shape: leave out model.{key}")
    if config.train.tokens is not None and any(word.startswith("train.tokens=") for word in overrides):  # steps overrule a file's
        raise ConfigError("--sizes sets train.steps: leave out train.tokens")
    shards, sizes_of_steps = open_data(config)[0], batch_sizes(vars(config.train))
    found: list[Rung] = []
    for size in sizes:
        of_size = load_config(file, [*overrides, f"model.size={size}"])
        model, context = build_from_config(of_size, vocabulary(of_size, shards.vocab_size), device="meta")
        weights = model.num_parameters()
        if found and weights <= found[-1].weights:
            raise ConfigError(
                f"--sizes must ascend: {size} has {weights:,} weights, {found[-1].size} before it {found[-1].weights:,}"
            )
        for ratio in ratios:
            steps = nearest_steps(sizes_of_steps, ratio * weights / context)
            if steps < FEWEST_STEPS:
                raise ConfigError(
                    f"--tokens-per-parameter {ratio:g}: {size} would train for {steps} steps, expected at least {FEWEST_STEPS}; "
                    "lower train.batch_size or ask for more tokens"
                )
            width, tokens = SIZES[size].width, sizes_of_steps.between(0, steps) * context
            found.append(Rung(size, ratio, weights, width, steps, tokens, tokens / shards.n_tokens))
    return found


def nearest_steps(sizes: BatchSizes, sequences: float) -> int:
    """The number of steps that reads nearest to this many sequences."""
    before = sizes.steps_for(math.ceil(sequences)) - 1
    return round(before + (sequences - sizes.between(0, before)) / sizes.at(before))


def searched_at(rungs: Sequence[Rung]) -> Rung:
    """The rung of the search: the smallest size, at the middle one of its budgets (of two, the longer)."""
    smallest = [rung for rung in rungs if rung.size == rungs[0].size]
    return smallest[len(smallest) // 2]


def weights_beyond(config: Config) -> dict[str, int]:
    """The number of weights of the sizes in BEYOND, with the data's vocabulary."""
    shards, found = open_data(config)[0], {}
    for size in BEYOND:
        of_size = Config(model=type(config.model)(size=size, vocab_size=config.model.vocab_size))
        found[size] = build_from_config(of_size, vocabulary(of_size, shards.vocab_size), device="meta")[0].num_parameters()
    return found


def ladder_record(
    rungs: Sequence[Rung], runs: Mapping[str, Mapping[str, Sequence[Run]]], beyond: Mapping[str, int], rule: str
) -> dict[str, Any]:
    """The section `ladder` of results.json. `runs` has the final runs by rung's name and optimizer's label."""
    labels = list(runs[rungs[0].name])
    losses = {
        label: [
            {} if any(run.status == "diverged" for run in runs[rung.name][label]) else finals(runs[rung.name][label])
            for rung in rungs
        ]
        for label in labels
    }
    found: dict[str, Any] = {
        "reference": REFERENCE,
        "searched_at": searched_at(rungs).text,
        "rule": rule,
        "rungs": [
            asdict(rung)
            | {
                "losses": {label: {str(seed): loss for seed, loss in losses[label][i].items()} for label in labels},
                "settings": {label: setting_of(runs[rung.name][label]) for label in labels},
                "diverged": {label: sum(run.status == "diverged" for run in runs[rung.name][label]) for label in labels},
            }
            for i, rung in enumerate(rungs)
        ],
        "fit": None,
        "speedups": [],
        "trend": [],
        "sentences": [],
        "notes": notes(rungs),
    }
    reference = next((label for label in labels if label.partition("{")[0] == REFERENCE), None)
    found["reference"] = reference
    cells = [Cell(rung.size, rung.weights, rung.tokens) for rung in rungs]
    usable = [i for i in range(len(rungs)) if reference is not None and losses[reference][i]]
    why = why_no_fit([cells[i] for i in usable]) if reference else f"{REFERENCE} is not among the optimizers"
    if why is None:
        try:
            add_speedups(
                found, [rungs[i] for i in usable], {k: [v[i] for i in usable] for k, v in losses.items()}, str(reference), beyond
            )
        except ValueError as error:
            why = str(error)
    if why is not None:
        found["notes"].append(f"No data speedup: {why}.")
    return found


def add_speedups(
    found: dict[str, Any],
    rungs: Sequence[Rung],
    losses: Mapping[str, Sequence[Mapping[int, float]]],
    reference: str,
    beyond: Mapping[str, int],
) -> None:
    """Put fit, speedups, trend and sentences into `found`, the section of results.json."""
    cells = [Cell(rung.size, rung.weights, rung.tokens) for rung in rungs]
    silent: dict[str, dict[str, float]] = {}
    for label in losses:
        speedups = Speedups(cells, losses[reference], losses[label])
        if label == reference:
            fit = speedups.fit
            found["fit"] = {
                "exponent": fit.exponent, "unit": fit.unit, "scale": fit.scale, "floor": fit.floor, "misfit": fit.misfit
            }  # fmt: skip
            if fit.misfit > MISFIT:
                found["notes"].append(
                    f"{label}'s losses do not follow a power law here: the fit misses them by up to {fit.misfit:.3f} nats. The "
                    "intervals of the speedups do not hold that error."
                )
            if fit.at_edge:
                found["notes"].append(f"{label}'s fit ends at the smallest or the largest B that is tried, {fit.exponent:.2f}.")
            continue
        at_cells = [(rung, speedups.at(i)) for i, rung in enumerate(rungs)]
        found["speedups"] += [
            {"label": label, "size": rung.size, "ratio": rung.ratio} | as_json(s) for rung, s in at_cells if s is not None
        ]
        longest = max(rung.ratio for rung in rungs)
        for size, weights in beyond.items():
            said = speedups.trend(weights, longest)
            if said is None:
                continue
            if said.low is not None and said.high is not None and said.high > WIDEST * said.low:
                silent.setdefault(size, {})[label] = said.high / said.low if said.low else math.inf
                continue
            found["trend"].append({"label": label, "size": size, "weights": weights, "ratio": longest} | as_json(said))
        known = [(rung, s) for rung, s in at_cells if s is not None]
        if known:
            found["sentences"].append(sentence(label, reference, *known[-1]))
        for entry in [e for e in found["trend"] if e["label"] == label][-1:]:
            found["sentences"].append(
                f"{label}: the trend over the ladder says {span(entry)} at {entry['size']} with {longest:g} tokens per weight, "
                f"{entry['weights'] / rungs[-1].weights:,.0f} times the largest model that was run, if the trend continues."
            )
    for size, spans in silent.items():
        found["notes"].append(
            f"The trend over the ladder says nothing about {size} for {', '.join(spans)}: an interval spans a factor of "
            + (f"{min(spans.values()):,.0f} or more." if math.isfinite(min(spans.values())) else "more than can be said.")
        )


def sentence(label: str, reference: str, rung: Rung, s: Speedup) -> str:
    """The sentence about the largest and longest rung."""
    if math.isinf(s.value):
        return f"{label} at {rung.text}: {reference} would not get to its loss with any amount of data, says its fit."
    far = f"; {reference} would need more tokens than it was given, so that its fit is extended" if s.beyond else ""
    claim = "" if s.low is None or s.low > 1 or (s.high or 0) < 1 else ", which may be none"
    return f"{label} at {rung.text}: a data speedup of {span(as_json(s))} over {reference}{claim}{far}."


def span(entry: Mapping[str, Any]) -> str:
    """A speedup and its interval in words."""
    if entry["value"] is None:
        return "no finite speedup"
    if entry["low"] is None:
        return f"{entry['value']:.2f} (one seed: no interval)"
    high = "∞" if entry["high"] is None or entry["high"] >= 1000 else f"{entry['high']:.2f}"
    return f"{entry['value']:.2f} ({entry['low']:.2f} to {high})"


def as_json(s: Speedup) -> dict[str, Any]:
    """A speedup as JSON; null: infinite, or not known."""
    values = {"value": s.value, "low": s.low, "high": s.high}
    return {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()} | {"beyond": s.beyond}


def finals(runs: Sequence[Run]) -> dict[int, float]:
    """The final losses of finished runs by seed."""
    return {run.seed: run.validation[-1]["val_loss"] for run in runs if run.validation}


def setting_of(runs: Sequence[Run]) -> dict[str, float | None] | None:
    """The rates that an optimizer trained with at a rung; None if it was not run."""
    if not runs:
        return None
    section = runs[0].config.optimizer
    return {"lr": section.lr, "adamw_lr": section.adamw_lr, "weight_decay": section.weight_decay}


def notes(rungs: Sequence[Rung]) -> list[str]:
    """What a reader must know of the ladder."""
    said = [
        "Tokens per weight count all weights, embeddings included. A data speedup compares ends of training runs, each with a "
        "schedule of its own."
    ]
    repeated = [rung for rung in rungs if rung.epochs > 1]
    if repeated:
        most = max(repeated, key=lambda rung: rung.epochs)
        said.append(
            f"{len(repeated)} of {len(rungs)} rungs read their data more than once ({most.text}: {most.epochs:.1f} times): the "
            "fit counts repeated tokens as new ones."
        )
    return said
