"""One comparison: which training runs it asks for, in which order, and how it describes them."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from celo2.rule_files import HUB
from celo2.training.search import FACTOR, MOST_ROUNDS, Key, Search, Setting, at_the_start, begin, grid, lowered, search
from configs.length import batch_sizes
from configs.load import ConfigError, load_config
from data.files import replace_text
from launch.checkpoint.verify import MANIFEST, sha256
from launch.compare.contestants import Contestant, parse_all
from launch.compare.curves import Run, read_run
from launch.compare.keys import SEARCHABLE, checked, keys_of, overrides_of, values_of
from launch.compare.ladder import REFERENCE, Rung, rungs_of, searched_at
from launch.compare.planning import planned
from launch.compare.trials import Pool, Trial
from launch.optimizers.width import at_width, stated
from launch.run.initialize import OF_AVERAGE, find_source
from launch.run.mixture import name_of_data
from launch.run.setup import open_data

POINTS = 20  # least number of evaluations of a curve: tokens to a loss are interpolated between them
TRIALS_PER_KEY = 6  # of a joint search, unless --trials says how many
FIRST_LRS = 3  # the number of learning rates that a joint search begins with
RATES = ("lr", "adamw_lr")  # a ladder takes the lowest ones that the search does not tell from the best
FLOPS = "FLOPs are the model's (forward and backward), without the optimizer's own, which the seconds contain."
INTERVALS = (
    "Intervals are Student's t over seeds, at 95 % confidence. Differences are {pairing}, and tested two-sided, with Holm's "
    "correction for the number of pairs. Without p < 0.05 there is no claim."
)


class Comparison:
    """One comparison: its contestants, its folder, and the trials it asks for."""

    def __init__(self, args: argparse.Namespace, out: Path) -> None:
        self.args, self.out = args, out
        self.config = load_config(args.config, args.overrides)
        names = checked(args.search or ["lr"], self.config)
        self.contestants = parse_all(args.optimizers, self.config)
        self.by_label = {c.label: c for c in self.contestants}
        self.keys = {c.label: keys_of(c, names, self.config) for c in self.contestants}
        self.trials = args.trials or (5 if names == ["lr"] else TRIALS_PER_KEY * len(names))
        self.rungs = self.ladder() if args.sizes else []
        self.check_start()
        self.pool = Pool(args.parallel)
        self.searched: list[Trial] = []
        self.error = 0.0  # standard error of a difference in the search

    def ladder(self) -> list[Rung]:
        """The rungs of --sizes. Without rungs, all runs have the configuration's own model and budget."""
        if all(c.label.partition("{")[0] != REFERENCE for c in self.contestants):
            raise ConfigError(f"--sizes needs {REFERENCE} among --optimizers: speedups are measured against its fit")
        if any(section.base_width is not None for section in (self.config.optimizer, *(c.section for c in self.contestants))):
            raise ConfigError("--sizes gives every width the rates that follow from the smallest: set optimizer.base_width=null")
        return rungs_of(self.args.config, self.args.overrides, self.args.sizes, self.args.tokens_per_parameter)

    def check_start(self) -> None:
        """Check that the folder holds no trials of an earlier start on other data, or from other initial weights.

        Raises:
            ConfigError: it holds such trials.
        """
        init = self.config.model.init
        mix = {} if self.config.data.mix is None else {"mix": self.config.data.mix}
        said: dict[str, Any] = json.loads(json.dumps({"data": open_data(self.config)[0].fingerprint} | mix))
        weights = None if init is None else weights_of(init)
        path = make_folder(self.out) / "comparison.json"
        if path.exists():
            try:
                before = dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                before = {}
            began = before.pop("model.init", weights)  # an earlier version did not note it
            if before != said:
                _, name = name_of_data(asdict(self.config.data))
                raise ConfigError(f"{self.out} holds a comparison on other data than {name}: choose another --out")
            if None not in (began, weights) and began != weights:
                raise ConfigError(
                    f"{self.out} holds a comparison that began with other weights than model.init={init} now has: choose "
                    "another --out, and name a checkpoint or commit, which stays as it is"
                )
        replace_text(path, json.dumps(said | ({} if weights is None else {"model.init": weights})) + "\n")

    def eval_every(self, steps: int) -> int:
        """Steps between evaluations: what the command line says, else at most a twentieth of the run."""
        given = self.config.eval.every
        if given and any(word.startswith("eval.every=") for word in self.args.overrides):
            return given
        most = max(1, steps // POINTS)
        return min(given, most) if given else most

    def trial(self, contestant: Contestant, values: dict[str, float], seed: int, keep: bool, rung: Rung | None = None) -> Trial:
        """The training run with these values by key and this seed, of the configuration's model and budget or of a rung."""
        common = self.args.overrides
        if any(word.startswith("schedule.kind=") for word in contestant.overrides):  # its schedule has other details
            common = [word for word in common if not word.startswith("schedule.")]
        own, name = overrides_of(contestant, self.config, values)
        folder = self.out / "trials" / (rung.name if rung else "") / contestant.slug / f"{name}_seed_{seed}"
        steps = rung.steps if rung else self.config.train.steps
        overrides = [*common, *contestant.overrides, *(rung.overrides if rung else ()), *own]
        overrides += [f"run.seed={seed}", f"run.name={contestant.slug}", f"run.dir={folder}"]
        overrides += ["checkpoint.keep=1", "log.sample_tokens=0"]
        if self.eval_every(steps) != self.config.eval.every:
            overrides.append(f"eval.every={self.eval_every(steps)}")
        return Trial(contestant.label, folder, self.args.config, tuple(overrides), keep, contestant.rule)

    def losses(
        self, phase: str, wanted: Sequence[tuple[str, Setting]], keys: Mapping[str, Sequence[Key]]
    ) -> list[tuple[float, ...]]:
        """Final validation losses of settings, each with every seed of the search."""
        first, count = self.config.run.seed, self.args.search_seeds
        rung = searched_at(self.rungs) if self.rungs else None
        trials = []
        for label, setting in wanted:
            values = dict(zip((key.name for key in keys[label]), setting, strict=True))
            trials += [self.trial(self.by_label[label], values, seed, False, rung) for seed in range(first, first + count)]
        self.searched += [trial for trial in trials if trial not in self.searched]
        found = [outcome.loss for outcome in self.pool.run(phase, trials)]
        return [tuple(found[i : i + count]) for i in range(0, len(found), count)]

    def search(self) -> dict[str, Search]:
        """Every contestant's search."""
        searches = {label: Search(keys) for label, keys in self.keys.items()}
        joint = bool(self.args.search) and self.args.search != ["lr"]
        count = min(FIRST_LRS, self.trials) if joint else self.trials
        firsts = {}
        for label, keys in self.keys.items():
            listed = self.args.lrs if keys[0].name == "lr" else []
            first = keys[0].first
            firsts[label] = begin(keys, listed or ([first] if keys[0].values else grid(first, count, keys[0].factor)))
        if all(len(settings) == 1 for settings in firsts.values()) and (self.trials == 1 or not joint):
            for label, (setting,) in firsts.items():
                searches[label].given = setting
                searches[label].notes.append(
                    "one setting was given: no search" if joint else "one learning rate was given: no search"
                )
        else:
            evaluate = lambda phase, wanted: self.losses(phase, wanted, self.keys)  # noqa: E731
            search(searches, firsts, self.trials if joint else 0, evaluate, self.pool.say)
        self.search_adamw_lrs(searches)
        if joint:
            self.put_back(searches)
        return searches

    def search_adamw_lrs(self, searches: dict[str, Search]) -> None:
        """Search the rates of --adamw-lrs for AdamW's part, at the chosen learning rate."""
        wanted = []
        for c in self.contestants:
            s = searches[c.label]
            if not (self.args.adamw_lrs and c.takes_adamw_lr and s.chosen is not None):
                continue
            usual = values_of(c, self.config, s.chosen[0])["adamw_lr"]
            others = [value for value in self.args.adamw_lrs if value != usual]
            key = Key("adamw_lr", usual, values=tuple(sorted({usual, *others})))
            s.losses = {(lr, values_of(c, self.config, lr)["adamw_lr"]): losses for (lr,), losses in s.losses.items()}
            s.keys = (*s.keys, key)
            if s.given is not None:
                s.given = (*s.given, usual)
                others = [] if not others else [usual, *others]
            wanted += [(c.label, (s.chosen[0], value)) for value in others]
        if wanted:
            keys = {label: s.keys for label, s in searches.items()}
            for (label, setting), losses in zip(wanted, self.losses("search of adamw_lr", wanted, keys), strict=True):
                searches[label].losses[setting] = losses
                searches[label].given = None

    def put_back(self, searches: dict[str, Search]) -> None:
        """Measure what tuning each key was worth: the loss of the chosen setting with that key alone back at its first value.
        Such a setting is no candidate, and does not count as a trial."""
        wanted = [(label, name, setting) for label, s in searches.items() for name, setting in at_the_start(s).items()]
        todo = [(label, setting) for label, _, setting in wanted if setting not in searches[label].losses]
        found = dict(zip(todo, self.losses("one key put back", todo, self.keys), strict=True)) if todo else {}
        for label, name, setting in wanted:
            s = searches[label]
            s.back[name] = s.losses[setting] if setting in s.losses else found[label, setting]

    def values(self, contestant: Contestant, s: Search, rung: Rung | None) -> dict[str, float]:
        """The chosen values by key; at a rung of another width, those that the rule for widths makes of them."""
        setting = () if s.chosen is None else s.chosen if rung is None else lowered(s, RATES, self.error)
        chosen = dict(zip((key.name for key in s.keys), setting, strict=True))
        base = searched_at(self.rungs) if self.rungs else None
        if rung is None or base is None or rung.width == base.width:
            return chosen
        usual = values_of(contestant, self.config, chosen.get("lr", contestant.lr))
        followed = {"lr": usual["lr"], "weight_decay": usual["weight_decay"]}
        if contestant.takes_adamw_lr:
            followed["adamw_lr"] = usual["adamw_lr"]
        wide = at_width(followed | chosen, base.width, rung.width, contestant.section)
        return {name: float(f"{value:.3g}") for name, value in wide.items()}

    def seeds(self) -> range:
        """The seeds of the final runs, which the search has not seen."""
        first = self.config.run.seed + self.args.search_seeds
        return range(first, first + self.args.seeds)

    def finals(self, searches: dict[str, Search]) -> dict[str, dict[str, list[Run]]]:
        """The runs of the chosen settings with the final seeds, by rung's name and label. Without a ladder the name is empty."""
        groups: dict[str, dict[str, list[Run]]] = {}
        rungs: list[Rung | None] = [*self.rungs] or [None]
        for rung in rungs:
            chosen = [c for c in self.contestants if searches[c.label].chosen is not None]
            trials = [
                self.trial(c, self.values(c, searches[c.label], rung), seed, True, rung) for seed in self.seeds() for c in chosen
            ]
            self.pool.run(f"final seeds, {rung.text}" if rung else "final seeds", trials)
            group: dict[str, list[Run]] = {c.label: [] for c in self.contestants}
            for trial in trials:
                group[trial.label].append(read_run(trial.folder, trial.label, trial.command))
            groups[rung.name if rung else ""] = group
        self.check_start()  # the run that model.init names may have saved a checkpoint since
        return groups

    def plan(self, searches: dict[str, Search]) -> dict[str, Any]:
        """How many seeds would tell the contestants apart; shown before the final runs."""
        found = planned(searches, self.args.seeds)
        self.error = (found["sd"] or 0.0) / math.sqrt(self.args.search_seeds)
        for s in searches.values():
            if self.rungs and s.chosen is not None:
                taken = zip(s.keys, lowered(s, RATES, self.error), s.chosen, strict=True)
                s.notes += [
                    f"the ladder takes {key.name} {low:g} and not {best:g}, which the search does not tell apart"
                    for key, low, best in taken
                    if low != best
                ]
        for line in found["sentences"]:
            self.pool.say(line)
        return found

    def method(self, searches: dict[str, Search]) -> list[str]:
        """How the numbers were obtained, in sentences."""
        c, a = self.config, self.args
        numbers = self.seeds()
        seeds = f"seed {numbers[0]}" if len(numbers) == 1 else f"seeds {numbers[0]} to {numbers[-1]}"
        adamw = "that of each trial (tied)" if c.optimizer.adamw_lr is None else f"{c.optimizer.adamw_lr:g}"
        if a.adamw_lrs:
            adamw += f", and then searched over {', '.join(f'{v:g}' for v in a.adamw_lrs)} at the chosen learning rate"
        joint = a.search or ["lr"]
        if "adamw_lr" in joint:
            adamw += ", where the search began"
        whole = f"the same budget: {c.train.steps:,} steps of {batch_sizes(vars(c.train)).text('sequences')}"
        budget = "the budget of each rung" if self.rungs else whole
        every = "twenty times or more" if self.rungs else f"every {self.eval_every(c.train.steps)} steps"
        said = [
            f"Every optimizer trains the same model on the same batches for {budget}. Initial weights and data order follow from "
            f"the seed alone. Each run is evaluated {every}.",
            f"AdamW trains the parameters that are not hidden matrices. Its learning rate (adamw_lr) was {adamw}, by the same "
            "rule for all.",
        ]
        said += [f"{c.label}: {'; '.join(c.special)}." for c in self.contestants if c.special]
        if any(s.trials for s in searches.values()):
            said += self.search_method(joint, seeds)
        else:
            what = "The learning rate was" if joint == ["lr"] else "The settings were"
            said.append(f"{what} given, not searched for. The runs have {seeds}.")
        if "lr" not in joint:
            rates = ", ".join(f"{contestant.lr:g} ({contestant.label})" for contestant in self.contestants)
            said.append(f"The learning rate was not searched: {rates}.")
        if self.rungs:
            said.append(self.rule())
        if c.optimizer.base_width is not None:
            said.append(
                f"Rates are those of width {c.optimizer.base_width}; the model's follow from them (optimizer.base_width)."
            )
        if a.seeds > 1:
            said.append(INTERVALS.format(pairing="paired by seed"))
        said.append("A run counts as diverged if its loss stops being finite, or if it ends no lower than it began.")
        side_by_side = f" {self.pool.parallel} trials ran at a time." if self.pool.parallel > 1 else ""
        said.append(f"Seconds are those in training steps, without evaluation and checkpoints.{side_by_side}")
        said.append(FLOPS)
        said.append(
            "The shares of tokens and time to another's loss are cautious: a run whose schedule was made for fewer tokens would "
            "often reach that loss earlier."
        )
        return said

    def rule(self) -> str:
        """The rule by which the settings of a ladder follow from the search, as a sentence."""
        said = stated(searched_at(self.rungs).text)
        if self.error:
            said += (
                " Of learning rates that the search does not tell from the best (within one standard error, "
                f"{self.error:.2g}), the ladder takes the lowest that was tried, first of lr, then of adamw_lr: more data and "
                "larger models tolerate only lower ones."
            )
        return said

    def search_method(self, names: Sequence[str], seeds: str) -> list[str]:
        """How the search went, in sentences."""
        c, a = self.config, self.args
        begun = ", ".join(f"{lr:g}" for lr in a.lrs) if a.lrs else f"{self.trials} values a factor {FACTOR:g} apart"
        how = f"Every search began with {begun}, and all got the same number of trials."
        if list(names) != ["lr"]:
            how = (
                f"Every optimizer searched {', '.join(names)} together, as far as it has them, by coordinate descent with "
                f"{self.trials} trials, {steps_of(names)}."
            )
        first, count = c.run.seed, a.search_seeds
        decided = f"with seed {first}" if count == 1 else f"in the mean of seeds {first} to {first + count - 1}"
        return [
            f"{how} While any optimizer's best value was at the edge of its grid, each got one more trial (at most "
            f"{MOST_ROUNDS}): beyond the edge, or beside its best.",
            f"The lowest final validation loss {decided} decided the search. The best of many trials looks better than it is, "
            f"so no trial of the search counts as a result: all results are from new runs with {seeds}. The validation "
            "sequences are the same in both.",
        ]


def steps_of(names: Sequence[str]) -> str:
    """The steps in which keys are searched for, in words."""
    factors: dict[float, list[str]] = {}
    for name in names:
        if not SEARCHABLE[name].values:
            factors.setdefault(SEARCHABLE[name].factor, []).append(name)
    said = " or ".join(f"{factor:g} ({', '.join(found)})" for factor, found in sorted(factors.items()))
    listed = [name for name in names if SEARCHABLE[name].values]
    parts = [f"in steps of a factor {said}, then finer"] if said else []
    return "; ".join([*parts, *([f"{', '.join(listed)} over fixed values"] if listed else [])])


def weights_of(init: str) -> str | None:
    """What identifies the weights of `model.init`, since the same name may stand for other weights later: the sha256 of a
    checkpoint's manifest, or a commit of the Hugging Face hub. None for a folder of transformers, or one that is gone.

    Raises:
        ConfigError, CheckpointError: as `find_source`.
    """
    if not init.startswith(HUB) and not Path(init.removeprefix(OF_AVERAGE)).expanduser().exists():
        return None  # finished trials do not need it, and a new one says that it is not there
    path = find_source(init, weights=False).path
    if (path / MANIFEST).is_file():
        return sha256(path / MANIFEST)
    return path.name if init.startswith(HUB) else None


def make_folder(out: Path, option: str = "--out") -> Path:
    """Make the folder of the report. Raises ConfigError if a file is in the way, or for another reason."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{option} {out}: a file is in the way") from None
    except OSError as error:
        raise ConfigError(f"{option} {out}: cannot make it ({error.strerror})") from None
    return out
