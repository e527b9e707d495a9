"""Which optimizer is better on this model and data, by how much, and is that more than noise?

    python -m launch.compare CONFIG.yaml --optimizers celo2 adamw muon --out runs/compare [section.key=value ...]
    python -m launch.compare --runs DIR DIR ... --out DIR        runs that are there already
    python -m launch.compare --results FILE --out DIR            the page and the pictures of a results.json, drawn again

Every optimizer trains the same model on the same batches for the same tokens. First each searches its learning rate with the
same number of trials; then its best setting runs with several other seeds. The same command continues after any interruption.
OUT/report.html, report.png, details.png and results.json say what came out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
from jinja2 import TemplateError

from celo2 import RuleError
from celo2.training.configuration import parse_arguments
from configs.length import batch_sizes
from configs.load import ConfigError, load_config
from data import DataError
from data.files import replace_text
from launch.command import at_least
from launch.compare.contestants import Contestant, parse_all
from launch.compare.curves import Run, label_runs, read_run
from launch.compare.report import statements, write_report
from launch.compare.search import FACTOR, MOST_ROUNDS, Search, grid, search
from launch.compare.summary import summarize
from launch.compare.trials import Pool, Stopped, Trial, TrialError
from launch.monitoring.signals import STOPPED
from launch.run.mixture import name_of_data
from launch.run.setup import open_data
from models import ModelError

POINTS = 20  # evaluations that a curve has at least: tokens to a loss are interpolated between them
LIBRARIES = ("torch", "transformers", "pytorch_optimizer", "schedulefree")  # whose versions change the numbers
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
        self.contestants = parse_all(args.optimizers, self.config)
        self.check_data()
        self.pool = Pool(args.parallel)
        self.searched: list[Trial] = []

    def check_data(self) -> None:
        """Trials of an earlier start on other data must not be taken for trials on these."""
        mix = {} if self.config.data.mix is None else {"mix": self.config.data.mix}
        said = json.dumps({"data": open_data(self.config)[0].fingerprint} | mix) + "\n"
        path = make_folder(self.out) / "comparison.json"
        if path.exists() and path.read_text(encoding="utf-8") != said:
            _, name = name_of_data(asdict(self.config.data))
            raise ConfigError(f"{self.out} holds a comparison on other data than {name}: choose another --out")
        replace_text(path, said)

    @property
    def eval_every(self) -> int:
        """Steps between evaluations: what the command line says, else at most a twentieth of the run."""
        given = self.config.eval.every
        if given and any(word.startswith("eval.every=") for word in self.args.overrides):
            return given
        most = max(1, self.config.train.steps // POINTS)
        return min(given, most) if given else most

    def trial(self, contestant: Contestant, lr: float, adamw_lr: float | None, seed: int, keep: bool) -> Trial:
        """The run of one setting and seed."""
        common = self.args.overrides
        if any(word.startswith("schedule.kind=") for word in contestant.overrides):  # its schedule has other details
            common = [word for word in common if not word.startswith("schedule.")]
        overrides, name = [*common, *contestant.overrides, f"optimizer.lr={lr:g}"], f"lr_{lr:g}"
        if adamw_lr is not None:
            overrides.append(f"optimizer.adamw_lr={adamw_lr:g}")
            name += f"_adamw_{adamw_lr:g}"
        folder = self.out / "trials" / contestant.slug / f"{name}_seed_{seed}"
        overrides += [f"run.seed={seed}", f"run.name={contestant.slug}", f"run.dir={folder}"]
        overrides += ["checkpoint.keep=1", "log.sample_tokens=0"]
        if self.eval_every != self.config.eval.every:
            overrides.append(f"eval.every={self.eval_every}")
        return Trial(contestant.label, folder, self.args.config, tuple(overrides), keep)

    def search(self) -> dict[str, Search]:
        """Every contestant's search, with the seed of the configuration."""
        by_label = {c.label: c for c in self.contestants}

        def try_all(phase: str, wanted: list[tuple[str, float, float | None]]) -> list[float]:
            seed = self.config.run.seed
            trials = [self.trial(by_label[label], lr, adamw_lr, seed, keep=False) for label, lr, adamw_lr in wanted]
            self.searched += trials
            return [o.loss for o in self.pool.run(phase, trials)]

        grids = {c.label: self.args.lrs or grid(c.lr, self.args.trials) for c in self.contestants}
        searches = search(grids, lambda phase, wanted: try_all(phase, [(*w, None) for w in wanted]), self.pool.say)
        wanted = []
        for c in self.contestants:
            lr = searches[c.label].lr
            if c.takes_adamw_lr and lr is not None:
                others = [v for v in self.args.adamw_lrs if v != self.config.optimizer.adamw_lr]
                wanted += [(c.label, lr, adamw_lr) for adamw_lr in others]
        losses = try_all("search of adamw_lr", wanted) if wanted else []
        for (label, _, adamw_lr), loss in zip(wanted, losses, strict=True):
            searches[label].adamw[adamw_lr] = loss
        return searches

    def finals(self, searches: dict[str, Search]) -> dict[str, list[Run]]:
        """The runs of the chosen settings with seeds that the search has not seen, by label."""
        trials = []
        for seed in range(self.config.run.seed + 1, self.config.run.seed + 1 + self.args.seeds):
            for c in self.contestants:
                chosen = searches[c.label]
                if chosen.lr is not None:
                    trials.append(self.trial(c, chosen.lr, chosen.adamw_lr, seed, keep=True))
        groups: dict[str, list[Run]] = {c.label: [] for c in self.contestants}
        self.pool.run("final seeds", trials)
        for trial in trials:
            groups[trial.label].append(read_run(trial.folder, trial.label, trial.command))
        return groups

    def method(self, searches: dict[str, Search]) -> list[str]:
        """How the numbers came about, in sentences."""
        c, a = self.config, self.args
        first, last = c.run.seed + 1, c.run.seed + a.seeds
        seeds = f"seed {first}" if a.seeds == 1 else f"seeds {first} to {last}"
        adamw = "that of each trial (tied)" if c.optimizer.adamw_lr is None else f"{c.optimizer.adamw_lr:g}"
        if a.adamw_lrs:
            adamw += f", and then searched over {', '.join(f'{v:g}' for v in a.adamw_lrs)} at the chosen learning rate"
        said = [
            f"Every optimizer trains the same model on the same batches for the same budget: {c.train.steps:,} steps of "
            f"{batch_sizes(vars(c.train)).text()} sequences. Initial weights and data order follow from the seed alone. "
            f"Each run is evaluated every {self.eval_every} steps.",
            f"AdamW trains the parameters that are no hidden matrices. Its learning rate (adamw_lr) was {adamw}, by the same "
            "rule for all.",
        ]
        said += [f"{c.label}: {'; '.join(c.special)}." for c in self.contestants if c.special]
        if any(s.trials for s in searches.values()):
            begun = ", ".join(f"{lr:g}" for lr in a.lrs) if a.lrs else f"{a.trials} values a factor {FACTOR:g} apart"
            said += [
                f"Every search began with {begun}, and all got the same number of trials. While any optimizer's best value was "
                f"at the edge of its grid, each got one more trial (at most {MOST_ROUNDS}): beyond the edge, or beside its best.",
                f"The lowest final validation loss with seed {c.run.seed} decided the search. The best of many trials looks "
                f"better than it is, so no trial of the search counts as a result: all results are from new runs with {seeds}. "
                "The validation sequences are the same in both.",
            ]
        else:
            said.append(f"The learning rate was given, not searched for. The runs have {seeds}.")
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


def compare(args: argparse.Namespace, command: str) -> None:
    """Search, final seeds, report."""
    comparison = Comparison(args, Path(args.out or f"runs/compare-{Path(args.config).stem}"))
    with comparison.pool as pool:
        searches = comparison.search()
        groups = comparison.finals(searches)
    title = f"{comparison.config.run.name}: {', '.join(groups)}"
    said = about(title, command, comparison.method(searches)) | {"search_commands": [t.command for t in comparison.searched]}
    finish(comparison.out, summarize(groups, searches, said), pool.say)


def compare_runs(folders: Sequence[str], out: Path, command: str) -> None:
    """A report on runs that are there already."""
    runs = []
    for folder in map(Path, folders):
        run = read_run(folder)
        if run.status != "diverged" and not run.validation:
            raise ConfigError(f"{folder} has no evaluation (val_loss in metrics.jsonl): nothing to compare")
        whole = folder.resolve()  # the command is typed beside train.py, which need not be here
        run.command = shlex.join(["python", "train.py", str(whole / "config.yaml"), f"run.dir={whole}-again"])
        runs.append(run)
    label_runs(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    method = [
        "The runs were there already. What was searched for, and how hard, is not known here.",
        INTERVALS.format(pairing="paired by seed where two seeds or more are common, else Welch's"),
        FLOPS,
    ]
    finish(make_folder(out), summarize(groups, {}, about(", ".join(groups), command, method)), print)


def about(title: str, command: str, method: list[str]) -> dict[str, object]:
    """What a reader needs to place the numbers."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} CPU cores"
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = torch.__version__ if library == "torch" else version(library)
        except PackageNotFoundError:
            continue
    return {"title": title, "command": command, "device": device, "versions": versions, "method": method}


def make_folder(out: Path) -> Path:
    """The folder of the report, which a file cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"--out {out}: a file is in the way") from None
    return out


def draw_again(path: str, out: Path | None) -> None:
    """The report of a results.json that is there, beside it or in `out`."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        page = write_report(make_folder(out or Path(path).parent), results)
    except OSError as error:
        raise ConfigError(f"cannot read results '{path}' ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, AttributeError, TemplateError):
        raise ConfigError(f"{path} is no results.json of a comparison") from None
    print(f"report: {page}")


def finish(out: Path, results: dict, say: Any) -> None:
    """Write the report and say what it says."""
    page = write_report(out, results)
    shown, folded = statements(results)
    for _, line in shown:
        say(line)
    if folded:
        say(f"and {len(folded)} more pair{'s' * (len(folded) > 1)}, in the report")
    say(f"report: {page}")


class Parser(argparse.ArgumentParser):
    """Mistakes are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')} (all options: python -m launch.compare --help)")


def is_override(text: str) -> bool:
    """Whether a word of the command line is section.key=value, not an optimizer."""
    return "=" in text.partition("{")[0]


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="python -m launch.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a YAML file, as for train.py")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file, for all trials")
    optimizers = "names of optimizer.name, or dotted paths; options in braces: 'mypackage.Soap{route: hidden, arguments: {...}}'"
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help=optimizers)
    parser.add_argument("--lrs", nargs="+", metavar="LR", help="learning rates to begin with, for all (auto: around the usual)")
    parser.add_argument("--trials", type=at_least(1), default=5, help="learning rates to begin with when they are auto (5)")
    parser.add_argument("--adamw-lrs", nargs="+", metavar="LR", help="then try these for optimizer.adamw_lr")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="final runs of each optimizer (3)")
    parser.add_argument("--parallel", type=at_least(1), help="trials at a time (one for each visible GPU, else 1)")
    parser.add_argument("--runs", nargs="+", metavar="DIR", help="compare these runs instead of starting any")
    parser.add_argument("--results", metavar="FILE", help="draw the report of this results.json again")
    parser.add_argument("--out", help="folder of trials and report (runs/compare-<name of the file>)")
    args = parse_arguments(parser, argv)
    words = [args.config, *args.overrides] if args.config else []
    for key in ("optimizers", "lrs", "adamw_lrs"):  # overrides may stand behind a list
        listed = getattr(args, key) or []
        words += [word for word in listed if is_override(word)]
        setattr(args, key, [word for word in listed if not is_override(word)])
    args.config, *args.overrides = words or [None]
    args.lrs = learning_rates("--lrs", [] if args.lrs == ["auto"] else args.lrs)
    args.adamw_lrs = learning_rates("--adamw-lrs", args.adamw_lrs)
    if args.runs or args.results:
        kind = "--runs" if args.runs else "--results"
        others = sorted({word.partition("=")[0] for word in argv if word.startswith("--")} - {kind, "--out"})
        if args.config or others:
            others = ["a configuration", *others] if args.config else others
            raise ConfigError(f"{kind} takes what is there already: nothing else but --out goes with it, not {', '.join(others)}")
    elif not args.config or is_override(args.config):
        raise ConfigError("a configuration is missing: python -m launch.compare CONFIG.yaml --optimizers celo2 adamw")
    elif not args.optimizers:
        raise ConfigError("--optimizers is missing, such as --optimizers celo2 adamw muon")
    return args


def learning_rates(option: str, words: list[str]) -> list[float]:
    """Different positive numbers, ascending."""
    try:
        values = sorted({float(word) for word in words})
    except ValueError:
        values = [math.nan]
    if not all(0 < value < math.inf for value in values):
        raise ConfigError(f"{option} {' '.join(words)}: expected positive numbers" + (" or auto" if option == "--lrs" else ""))
    return values


def main(argv: list[str] | None = None) -> int:
    """Exit status 0: done; 2: bad input or a failed trial, said in one line; 75: saved and stopped by a signal;
    130: interrupted while no trial ran."""
    argv = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "launch.compare", *argv])
    try:
        args = arguments(argv)
        if args.results:
            draw_again(args.results, Path(args.out) if args.out else None)
        elif args.runs:
            compare_runs(args.runs, Path(args.out or "runs/compare"), command)
        else:
            compare(args, command)
    except Stopped:
        print("stopped by a signal, all trials are saved; the same command continues")
        return STOPPED
    except KeyboardInterrupt:
        print("interrupted; finished trials are kept, the same command continues", file=sys.stderr)
        return 130
    except (ConfigError, DataError, ModelError, RuleError, TrialError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
