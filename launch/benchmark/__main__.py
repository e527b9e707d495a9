"""`python -m launch.benchmark SUBJECT`: measure one subject, print a table, and write it as JSON when asked."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from configs.load import ConfigError
from launch.benchmark import gpu, loss, optimizer, precision, save, strategies, train, unroll
from launch.benchmark.measure import Row, available_device, table
from launch.distributed.heartbeat import print_error


class Subject(NamedTuple):
    """What can be measured. The module's first line says what it is, its COLUMNS how its rows are shown."""

    module: ModuleType
    measure: Callable[[argparse.Namespace, torch.device], Row]
    rounds: int = 7


SUBJECTS = {
    "optimizer": Subject(optimizer, lambda args, device: optimizer.measure_optimizers(args.rounds, device, args.sizes)),
    "train": Subject(
        train,
        lambda args, device: train.measure_training(args.rounds, device, args.sizes, args.micro_batch_size, args.profile),
    ),
    "loss": Subject(loss, lambda args, device: loss.measure_loss(args.rounds, device)),
    "save": Subject(save, lambda args, device: save.measure_save(args.rounds, device), 3),
    "strategies": Subject(strategies, lambda args, device: strategies.measure_strategies(device)),
    "precision": Subject(precision, lambda args, device: precision.measure_precision(args.rounds, device), 2),
    "unroll": Subject(unroll, lambda args, device: unroll.measure_unrolls(args.rounds, device)),
}


def make_parser(device: torch.device) -> argparse.ArgumentParser:
    """One subcommand for each subject, and `gpu`. The default sizes suit `device`."""
    parser = argparse.ArgumentParser(prog="python -m launch.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, subject in SUBJECTS.items():
        text = subject.module.__doc__ or ""
        command = commands.add_parser(name, help=text.splitlines()[0].partition(": ")[2], description=text)
        command.add_argument("--json", metavar="FILE", help="a file for the result")
        if name != "strategies":
            command.add_argument("--rounds", type=positive, default=subject.rounds)
    known = {"optimizer": [*optimizer.SMALL, *optimizer.SIZES], "train": list(train.BATCHES)}
    for name, choices in known.items():
        default = list(SUBJECTS[name].module.DEFAULT_SIZES[device.type])
        command = commands.choices[name]
        command.add_argument("--sizes", nargs="+", choices=choices, default=default, metavar="SIZE", help=", ".join(choices))
    command = commands.choices["train"]
    command.add_argument("--micro-batch-size", type=positive, metavar="N", help="sequences, instead of the usual")
    command.add_argument("--profile", metavar="FILE", help="a file for where the time of a step goes")
    command = commands.add_parser("gpu", help="all of it on a GPU, within ten minutes", description=gpu.__doc__)
    command.add_argument("--out", metavar="DIR", required=True, help="a folder for everything that is found")
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(argv: list[str] | None = None) -> int:
    """Exit status 0: measured; 1: a part of `gpu` failed; 2: bad input or no GPU, which one line explains."""
    argv = sys.argv[1:] if argv is None else argv
    device = available_device()
    args = make_parser(device).parse_args(argv)
    if args.what == "gpu":
        if device.type != "cuda":
            print_error("no GPU was found (torch.cuda.is_available() is false)")
            return 2
        rows = gpu.measure_gpu(Path(args.out), gpu.parts(Path(args.out)))
        print(table(rows, gpu.COLUMNS))
        return int(any(row["outcome"] != "done" for row in rows))
    subject = SUBJECTS[args.what]
    try:
        for path in (args.json, getattr(args, "profile", None)):  # an error now saves the minutes of measuring
            if path is not None:
                open(path, "a", encoding="utf-8").close()
        result = subject.measure(args, device)
    except (ConfigError, OSError) as error:
        print_error(str(error))
        return 2
    result["command"] = shlex.join(["python", "-m", "launch.benchmark", *argv])
    print(f"{result['machine']}; {result['versions']}; {result['rounds']} rounds; {result['note']}")
    print(f"\n{table(result['rows'], subject.module.COLUMNS)}")
    if args.json is not None:
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
