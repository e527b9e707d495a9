"""A run as the comparison sees it: curves over tokens, read from the run's folder; interpolation and crossings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from celo2 import load_rule
from celo2.training.metrics import read_lines, read_metrics
from configs.load import ConfigError, load_config
from configs.schema import Config
from launch.checkpoint.folders import CHECKPOINTS
from launch.checkpoint.load import optimizer_bytes
from launch.checkpoint.state import read_state
from launch.checkpoint.verify import list_checkpoints
from launch.monitoring.trackers import flat
from launch.run.agreement import RULE_FILE, rule_hash
from launch.run.branch import is_decisive, read_origin
from launch.run.restart import read_events
from launch.run.setup import build_from_config, vocabulary
from models import ModelError, flops_per_token

SPIKE = 1.0  # a trained model has diverged if it ends this many nats above its first evaluation
ALSO = ("train.steps ", "data.mix")  # what changes the steps of a run besides `is_decisive`
OF_OPTIMIZER = ("optimizer.", "schedule.", "train.steps")  # what a comparison is about
# Options on which the losses of a run do not depend; and the data, which `data_of` compares.
INCIDENTAL = (
    "run.", "log.", "checkpoint.", "distributed.", "data.", "model.gradient_checkpointing", "train.tokens",
    "train.micro_batch_size", "train.on_batch_change", "train.compile", "train.average", "train.deterministic",
    "train.max_bad_steps", "train.spike", "train.on_spike", "eval.every", "eval.sets", "eval.task", "eval.lm_eval",
)  # fmt: skip
Curve = list[tuple[float, float]]  # (x, y), x ascending


class Outcome(NamedTuple):
    """The status of a run."""

    status: str  # "new", "unfinished", "finished" or "diverged"
    loss: float = math.inf  # the last validation loss of a finished run; infinite otherwise


@dataclass
class Run:
    """One run: its configuration and what it logged."""

    label: str
    folder: Path
    config: Config
    command: str
    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    status: str = "finished"  # or "unfinished", "diverged"
    flops_per_token: float | None = None
    state_bytes: int | None = None
    changes: Sequence[str] = ()  # settings that were changed during the run, in words
    rule: str | None = None  # `rule_hash` of its rule; None: it has none, or it is not known

    @property
    def seed(self) -> int:
        """`run.seed`: initial weights and data order."""
        return self.config.run.seed

    @property
    def tokens(self) -> float:
        """Tokens at its last evaluation; 0 without one."""
        return self.validation[-1]["tokens"] if self.validation else 0

    def losses(self) -> Curve:
        """Validation loss over tokens."""
        return [(r["tokens"], r["val_loss"]) for r in self.validation]

    @cached_property
    def clock(self) -> Curve:
        """Seconds in training steps over tokens."""
        return [(0.0, 0.0)] + [(r["tokens"], r["seconds"]) for r in self.training]

    def seconds_at(self, tokens: float) -> float:
        """Seconds in training steps until `tokens`."""
        return at(self.clock, tokens)

    def steps_at(self, tokens: float) -> float:
        """Optimizer steps until `tokens`."""
        return at([(0, 0), *((r["tokens"], r["step"]) for r in self.validation)], tokens)


def stopped_diverged(folder: Path) -> bool:
    """Whether train.py ended a run early because it diverged, which is then its last event."""
    events = read_events(folder)
    by_event = bool(events) and events[-1].get("reason") == "diverged"
    return by_event or (folder / "diverged.json").exists()  # a file that launch.compare itself wrote before there were events


def standing(folder: Path, config: Config) -> Outcome:
    """The status of the run of `config`, from its folder."""
    if stopped_diverged(folder):
        return Outcome("diverged")
    return judge(read_metrics(folder / "metrics.jsonl"), config.train.steps, trained=config.model.init is not None)


def judge(records: list[dict], steps: int, trained: bool = False) -> Outcome:
    """The outcome of a run of `steps` steps with these records: finished, unless it ends no lower than it began.

    The loss of a model that was `trained` before (model.init) may rise a little, and is compared with its first evaluation.
    """
    last = next((r for r in reversed(records) if "val_loss" in r and r["step"] == steps), None)
    if last is None:
        return Outcome("unfinished")
    first = next((r["loss"] for r in records if "loss" in r), None)
    if trained:
        first = next((r["val_loss"] for r in records if r.get("val_loss") is not None and r is not last), None)
    no_lower = first is not None and last["val_loss"] is not None and last["val_loss"] >= first + (SPIKE if trained else 0)
    if last["val_loss"] is None or (no_lower and steps > 1):
        return Outcome("diverged")
    return Outcome("finished", last["val_loss"])


def read_run(folder: Path, label: str = "", command: str = "") -> Run:
    """A run from its folder; evaluations and losses that were not finite are left out.

    Raises:
        ConfigError, RuleError: the folder holds no run, or its files are damaged.
    """
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} holds no run: config.yaml is missing")
    config = load_config(folder / "config.yaml")
    records = read_metrics(folder / "metrics.jsonl")
    for number, line in enumerate(read_lines(folder / "metrics.jsonl"), 1):
        if not is_record(line):
            raise ConfigError(f"{folder / 'metrics.jsonl'}, line {number}: neither a training record nor an evaluation")
    training = [r for r in records if r.get("loss") is not None]
    validation = [r for r in records if r.get("val_loss") is not None]
    status = standing(folder, config).status
    flops, size = model_flops(folder, config), state_bytes(folder)
    changes, rule = changes_of(folder), rule_of_run(folder)
    return Run(label, folder, config, command, training, validation, status, flops, size, changes, rule)


def changes_of(folder: Path) -> list[str]:
    """What was changed in the middle of a run, as "optimizer.lr 0.001 -> 0.005 after step 300".

    What does not change the steps is left out; train.steps is kept, as schedules depend on it.
    """
    found: list[tuple[int, str]] = []
    for event in read_events(folder):
        step = event.get("step", 0)
        if event.get("event") == "start":  # the steps after this one are undone
            found = [change for change in found if change[0] < step]
        elif event.get("event") == "changed":
            options = [str(option) for option in event["options"]]
            found += [(step, option) for option in options if is_decisive(option.split()[0]) or option.startswith(ALSO)]
    return [f"{option} after step {step}" for step, option in found]


def rule_of_run(folder: Path) -> str | None:
    """`rule_hash` of the rule that a run trains with; None: it has none, or an earlier version did not note it.

    Raises:
        RuleError: the copy of the rule in its folder is damaged.
    """
    return rule_hash(load_rule(folder / RULE_FILE)) if (folder / RULE_FILE).is_file() else identity_in(folder).get("rule")


def identity_in(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint of a run records about it (`launch.run.agreement.identity_of`); empty without one."""
    checkpoints = list_checkpoints(folder / CHECKPOINTS)
    if not checkpoints or not (checkpoints[-1] / "state.json").exists():
        return {}
    try:
        return dict(read_state(checkpoints[-1])["identity"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{checkpoints[-1] / 'state.json'} is damaged") from None


def is_record(record: Any) -> bool:
    """Whether a line of metrics.jsonl is what train.py writes; other keys, as of a later version, are allowed."""
    if not isinstance(record, dict):
        return False
    known = ("step", "tokens", "val_loss") if "val_loss" in record else ("step", "tokens", "loss", "seconds")
    return all(isinstance(record.get(key, ""), int | float | None) for key in known)


def model_flops(folder: Path, config: Config) -> float | None:
    """Model FLOPs of a token (`models.flops`); None where the run's tokenizer is missing."""
    if not (folder / "tokenizer.json").exists():
        return None
    try:
        size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{folder / 'tokenizer.json'} is damaged ({error})") from None
    try:
        model, context = build_from_config(config, vocabulary(config, size), device="meta")
    except (ModelError, ConfigError) as error:
        raise ConfigError(f"{folder / 'config.yaml'}: {error}") from None
    return flops_per_token(model, context)


def state_bytes(folder: Path) -> int | None:
    """Bytes of optimizer state in the newest checkpoint of a run; None without one."""
    checkpoints = list_checkpoints(folder / CHECKPOINTS)
    return optimizer_bytes(checkpoints[-1]) if checkpoints else None


def at(curve: Curve, x: float) -> float:
    """The curve at `x`, by linear interpolation; beyond its ends, the value at the end."""
    xs, ys = zip(*curve, strict=True)
    return float(np.interp(x, xs, ys))


def upto(curve: Curve, x: float) -> Curve:
    """The curve until `x`, with an interpolated point at `x` if it has none there."""
    kept = [point for point in curve if point[0] <= x]
    return kept if (kept and kept[-1][0] == x) or curve[-1][0] < x else [*kept, (x, at(curve, x))]


def reaches(curve: Curve, target: float) -> float | None:
    """The x at which the curve first comes down to `target`, by linear interpolation; None if it never does."""
    before: tuple[float, float] | None = None
    for x, y in curve:
        if y <= target:
            if before is None or before[1] == y:
                return x
            return before[0] + (x - before[0]) * (before[1] - target) / (before[1] - y)
        before = (x, y)
    return None


def thinned(points: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the points, evenly spread, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    indices = np.unique(np.linspace(0, len(points) - 1, most).round().astype(int))
    return [points[i] for i in indices]


def label_runs(runs: list[Run]) -> None:
    """Label runs by what tells them apart: the optimizer's name, and options where one name stands for several settings.

    Raises:
        ConfigError: two runs have the same setting and seed, and so are not two samples.
    """
    for name in {run.config.optimizer.name for run in runs}:
        group = [run for run in runs if run.config.optimizer.name == name]
        options = [option | rule_content(run, group) for run, option in zip(group, settings(group), strict=True)]
        differing = [key for key in sorted(set().union(*options)) if len({o.get(key) for o in options}) > 1]
        for run, option in zip(group, options, strict=True):
            given = [key for key in differing if option.get(key, "None") != "None"]
            extra = ", ".join(f"{key.removeprefix('optimizer.')} {option[key]}" for key in given)
            run.label = f"{name} ({extra})" if extra else name
    seen: dict[tuple[str, int], Run] = {}
    for run in runs:
        other = seen.setdefault((run.label, run.seed), run)
        if other is not run:
            raise ConfigError(f"{other.folder} and {run.folder} are both {run.label} with seed {run.seed}: name one of them")


def settings(runs: Sequence[Run]) -> list[dict[str, str]]:
    """The options of each run on which its losses depend, and its data set."""
    options = [flat(asdict(run.config)) for run in runs]
    kept = [{key: str(value) for key, value in option.items() if not key.startswith(INCIDENTAL)} for option in options]
    return [option | {"data set": data} for option, data in zip(kept, data_of(runs), strict=True)]


def rule_content(run: Run, group: Sequence[Run]) -> dict[str, str]:
    """The content of a run's rule, if its name stands for several rules in a group of runs, as after a file was replaced."""
    contents = {other.rule for other in group if other.rule and other.config.optimizer.rule == run.config.optimizer.rule}
    return {"rule content": run.rule[:12]} if run.rule and len(contents) > 1 else {}


def other_differences(runs: list[Run]) -> list[str]:
    """Sentences on what else differs between runs: then the optimizer is not the only cause of a difference of losses."""
    options = [{k: v for k, v in option.items() if not k.startswith(OF_OPTIMIZER)} for option in settings(runs)]
    origins = [(run, read_origin(run.folder)) for run in runs]
    sentences = [
        f"{run.folder} branched from {origin.checkpoint}: its losses up to step {origin.step} are that run's."
        for run, origin in origins
        if origin is not None and origin.id
    ]
    for key in sorted(set().union(*options)):
        values = sorted({option.get(key, "none") for option in options})
        if len(values) > 1:
            what = "the data set" if key == "data set" else key
            sentences.append(f"The runs differ in {what} ({', '.join(values)}): their losses differ for that reason too.")
    return sentences


def data_of(runs: Sequence[Run]) -> list[str]:
    """What tells the runs' data sets apart: the fingerprints in their newest checkpoints, or else the names of their folders."""
    fingerprints = [identity_in(run.folder).get("data set") for run in runs]
    if all(fingerprints):
        return [str(fingerprint)[:12] for fingerprint in fingerprints]
    return [Path(run.config.data.dir or "none").name for run in runs]
