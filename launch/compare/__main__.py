"""Which optimizer is better on this model and data, by how much, and is that more than noise?

    python -m launch.compare CONFIG.yaml --optimizers celo2 adamw muon --out runs/compare [section.key=value ...]
    python -m launch.compare --runs DIR DIR ... --out DIR        compare existing runs
    python -m launch.compare --results FILE --out DIR            draw page and pictures of a results.json again
    ... --reference FILE --publish DIR                           add curves of other people; write a folder for a static host

Every optimizer trains the same model on the same batches for the same tokens. First each searches its learning rate, or several
keys together (--search), with the same number of trials; then its best setting runs with several other seeds. With --sizes, the
final runs are a ladder of models and budgets, and the report says how much data each optimizer saves. After any interruption the
same command resumes. The results are OUT/report.html, report.png, details.png and results.json.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
from jinja2 import TemplateError

from celo2 import RuleError
from celo2.training.configuration import parse_arguments
from configs.load import ConfigError
from data import DataError
from data.files import read_json
from launch.checkpoint.verify import CheckpointError
from launch.command import at_least
from launch.compare.comparison import FLOPS, INTERVALS, TRIALS_PER_KEY, Comparison, make_folder
from launch.compare.curves import Run, label_runs, read_run
from launch.compare.keys import SEARCHABLE
from launch.compare.ladder import ladder_record, weights_beyond
from launch.compare.publish import publish
from launch.compare.references import read_references
from launch.compare.report import statements, write_report
from launch.compare.summary import summarize
from launch.compare.trials import Stopped, TrialError
from launch.monitoring.signals import STOPPED
from models import ModelError

LIBRARIES = ("torch", "transformers", "pytorch_optimizer", "schedulefree")  # whose versions change the numbers


def compare(args: argparse.Namespace, command: str) -> None:
    """Search, final seeds, report."""
    comparison = Comparison(args, args.out)
    make_folders(args)  # now, not after the trials
    with comparison.pool as pool:
        searches = comparison.search()
        plan = comparison.plan(searches)
        groups = comparison.finals(searches)
    name, title = comparison.config.run.name, ", ".join(groups[next(iter(groups))])
    extra: dict[str, object] = {"search_commands": [t.command for t in comparison.searched], "planned": plan}
    if comparison.rungs:
        name += f", {comparison.rungs[-1].text}"
        extra["ladder"] = ladder_record(comparison.rungs, groups, weights_beyond(comparison.config), comparison.rule())
    said = about(f"{name}: {title}", command, comparison.method(searches)) | extra
    last = groups[list(groups)[-1]]  # of a ladder the largest and longest rung
    finish(summarize(last, searches, said, args.target_loss), pool.say, args)


def compare_runs(args: argparse.Namespace, command: str) -> None:
    """A report on existing runs."""
    runs = []
    for folder in map(Path, args.runs):
        run = read_run(folder)
        if run.status != "diverged" and not run.validation:
            raise ConfigError(f"{folder} has no evaluation (val_loss in metrics.jsonl): nothing to compare")
        whole = folder.resolve()  # a person runs the command beside train.py, which may be elsewhere
        run.command = shlex.join(["python", "train.py", str(whole / "config.yaml"), f"run.dir={whole}-again"])
        runs.append(run)
    label_runs(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    method = [
        "The runs existed already. How their settings were searched, and with how many trials, is not known.",
        INTERVALS.format(pairing="paired by seed where two seeds or more are common, else Welch's"),
        FLOPS,
    ]
    results = summarize(groups, {}, about(", ".join(groups), command, method), args.target_loss)
    make_folders(args)
    finish(results, print, args)


def about(title: str, command: str, method: list[str]) -> dict[str, object]:
    """What a reader must know about the origin of the numbers."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} CPU cores"
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = torch.__version__ if library == "torch" else version(library)
        except PackageNotFoundError:
            continue
    return {"title": title, "command": command, "device": device, "versions": versions, "method": method}


def draw_again(args: argparse.Namespace) -> None:
    """Draw the report of an existing results.json again, beside it or in --out."""
    path = args.results
    no_results = ConfigError(f"{path} is not a results.json that launch.compare wrote")
    try:
        results = read_json(Path(path))
    except OSError as error:
        raise ConfigError(f"cannot read results '{path}' ({error.strerror})") from None
    except ValueError:
        raise no_results from None
    make_folders(args)
    try:
        page = write(results, args)
    except (ValueError, LookupError, TypeError, AttributeError, TemplateError):
        raise no_results from None
    print(f"report: {page}")


def make_folders(args: argparse.Namespace) -> None:
    """Make the folders of --out and --publish."""
    make_folder(args.out)
    if args.publish:
        make_folder(args.publish, "--publish")


def write(results: dict, args: argparse.Namespace) -> Path:
    """Write the report with --reference, and for --publish; returns the page's path."""
    if args.references:
        results["references"] = args.references
    page = write_report(args.out, results)
    if args.publish:
        publish(results, args.publish)
    return page


def finish(results: dict, say: Any, args: argparse.Namespace) -> None:
    """Write the report and print its sentences."""
    page = write(results, args)
    shown, folded = statements(results)
    for _, line in shown:
        say(line)
    if folded:
        say(f"and {len(folded)} more pair{'s' * (len(folded) > 1)}, in the report")
    ladder, target = results.get("ladder") or {}, results.get("target") or {}
    for line in [*results["tuning"], *target.get("sentences", ()), *ladder.get("sentences", ()), *ladder.get("notes", ())]:
        say(line)
    say(f"report: {page}")


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage before it."""

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
    keys = f"search these keys together, by coordinate descent: {', '.join(SEARCHABLE)} (default: lr)"
    parser.add_argument("--search", nargs="+", metavar="KEY", help=keys)
    parser.add_argument(
        "--lrs", nargs="+", metavar="LR", help="first learning rates of the search, for all (auto: around the default)"
    )
    trials = f"trials of each optimizer's search ({TRIALS_PER_KEY} for each key; for lr alone: 5 learning rates)"
    parser.add_argument("--trials", type=at_least(1), help=trials)
    parser.add_argument(
        "--search-seeds", type=at_least(1), default=1, help="number of seeds of the search; their mean decides (1)"
    )
    parser.add_argument("--adamw-lrs", nargs="+", metavar="LR", help="afterwards search optimizer.adamw_lr over these")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="number of final runs of each optimizer (3)")
    parser.add_argument(
        "--sizes", nargs="+", metavar="SIZE", help="a ladder: these model sizes, ascending; the smallest is searched"
    )
    ratios = "with --sizes: training tokens for each weight, ascending, such as 5 20 80"
    parser.add_argument("--tokens-per-parameter", nargs="+", metavar="RATIO", help=ratios)
    target = "steps, tokens and seconds to this validation loss, and a test that an optimizer ends below it"
    parser.add_argument("--target-loss", metavar="LOSS", help=target)
    parser.add_argument("--parallel", type=at_least(1), help="trials at a time (one for each visible GPU, else 1)")
    parser.add_argument("--runs", nargs="+", metavar="DIR", help="compare these runs instead of starting any")
    parser.add_argument("--results", metavar="FILE", help="draw the report of this results.json again")
    references = "add the loss curves of other people's runs: a CSV, an export of W&B, JSON, marin's result.json"
    parser.add_argument("--reference", nargs="+", default=[], metavar="FILE", help=references)
    parser.add_argument(
        "--publish",
        metavar="DIR",
        help="also write the report to this folder, for a static web host, without paths of this machine",
    )
    parser.add_argument("--out", help="folder of trials and report (runs/compare-<name of the file>)")
    args = parse_arguments(parser, argv)
    words = [args.config, *args.overrides] if args.config else []
    lists = ("optimizers", "lrs", "adamw_lrs", "search", "sizes", "tokens_per_parameter", "reference")
    for key in lists:  # overrides may stand behind a list
        listed = getattr(args, key) or []
        words += [word for word in listed if is_override(word)]
        setattr(args, key, [word for word in listed if not is_override(word)])
    args.search = [key for word in args.search for key in word.split(",") if key]  # commas, as in celo2.metatrain.evaluate
    args.config, *args.overrides = words or [None]
    args.lrs = learning_rates("--lrs", [] if args.lrs == ["auto"] else args.lrs)
    args.adamw_lrs = learning_rates("--adamw-lrs", args.adamw_lrs)
    args.target_loss = None if args.target_loss is None else numbers("--target-loss", [args.target_loss], "a positive number")[0]
    args.tokens_per_parameter = numbers("--tokens-per-parameter", args.tokens_per_parameter, "positive numbers")
    if bool(args.sizes) != bool(args.tokens_per_parameter):
        raise ConfigError("--sizes and --tokens-per-parameter belong together: give both, or neither")
    if args.search and args.adamw_lrs:
        raise ConfigError("--search and --adamw-lrs exclude each other: name adamw_lr in --search")
    if args.search and args.lrs and "lr" not in args.search:
        raise ConfigError("--lrs is where the search of lr begins: name lr in --search, or leave --lrs out")
    args.references = [reference for path in args.reference for reference in read_references(path)]  # now, not after the trials
    if args.runs or args.results:
        kind = "--runs" if args.runs else "--results"
        allowed = ["--out", "--reference", "--publish", *(["--target-loss"] if args.runs else [])]
        others = sorted({word.partition("=")[0] for word in argv if word.startswith("--")} - {kind, *allowed})
        if args.config or others:
            others = ["a configuration", *others] if args.config else others
            raise ConfigError(
                f"{kind} uses existing results: it can be combined only with {', '.join(allowed[:-1])} and {allowed[-1]}, "
                f"not with {', '.join(others)}"
            )
    elif not args.config or is_override(args.config):
        raise ConfigError("a configuration is missing: python -m launch.compare CONFIG.yaml --optimizers celo2 adamw")
    elif not args.optimizers:
        raise ConfigError("--optimizers is missing, such as --optimizers celo2 adamw muon")
    args.out = Path(args.out) if args.out else usual_out(args)
    args.publish = args.publish and Path(args.publish)
    if args.publish and args.publish.resolve() in reports(args):
        raise ConfigError(
            f"--publish {args.publish}: this would replace the report there, which is the one with all paths; name another folder"
        )
    return args


def usual_out(args: argparse.Namespace) -> Path:
    """The folder of the report without --out."""
    if args.results:
        return Path(args.results).parent
    return Path("runs/compare" if args.runs else f"runs/compare-{Path(args.config).stem}")


def reports(args: argparse.Namespace) -> list[Path]:
    """The folders of the report that is written, and of the one that --results names."""
    drawn = [Path(args.results).parent] if args.results and (Path(args.results).parent / "report.html").exists() else []
    return [path.resolve() for path in (args.out, *drawn)]


def learning_rates(option: str, words: list[str]) -> list[float]:
    """Different positive numbers, ascending."""
    return sorted(set(numbers(option, words, "positive numbers" + (" or auto" if option == "--lrs" else ""))))


def numbers(option: str, words: Sequence[str] | None, expected: str) -> list[float]:
    """Positive numbers, in the order given."""
    try:
        values = [float(word) for word in words or ()]
    except ValueError:
        values = [math.nan]
    if not all(0 < value < math.inf for value in values):
        raise ConfigError(f"{option} {' '.join(words or ())}: expected {expected}")
    return values


def main(argv: list[str] | None = None) -> int:
    """Exit status 0: done; 2: bad input or a failed trial, named in one line; 75: saved and stopped by a signal;
    130: interrupted while no trial ran."""
    argv = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "launch.compare", *argv])
    try:
        args = arguments(argv)
        if args.results:
            draw_again(args)
        elif args.runs:
            compare_runs(args, command)
        else:
            compare(args, command)
    except Stopped:
        print("stopped by a signal, all trials are saved; the same command continues")
        return STOPPED
    except KeyboardInterrupt:
        print("interrupted; finished trials are kept, the same command continues", file=sys.stderr)
        return 130
    except (ConfigError, CheckpointError, DataError, ModelError, RuleError, TrialError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
