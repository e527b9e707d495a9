"""`python -m launch.benchmark SUBJECT`: measure one subject, print a table, and write it as JSON when asked."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from configs.load import ConfigError
from launch.benchmark import gpu, loss, optimizer, precision, save, strategies, train, unroll
from launch.benchmark.measure import Column, Row, available_device, table
from launch.distributed.heartbeat import print_error


class Subject(NamedTuple):
    """What can be measured: how, and how its rows are shown."""

    measure: Callable[[argparse.Namespace, torch.device], Row]
    columns: Sequence[Column]
    rounds: int = 7


SUBJECTS = {
    "optimizer": Subject(
        lambda args, device: optimizer.measure_optimizers(args.rounds, device, sizes(args, optimizer.DEFAULT_SIZES, device)),
        optimizer.COLUMNS,
    ),
    "train": Subject(
        lambda args, device: train.measure_training(
            args.rounds, device, sizes(args, train.DEFAULT_SIZES, device), args.micro_batch_size, args.profile
        ),
        train.COLUMNS,
    ),
    "loss": Subject(lambda args, device: loss.measure_loss(args.rounds, device), loss.COLUMNS),
    "save": Subject(lambda args, device: save.measure_save(args.rounds, device), save.COLUMNS, 3),
    "strategies": Subject(lambda args, device: strategies.measure_strategies(device), strategies.COLUMNS),
    "precision": Subject(lambda args, device: precision.measure_precision(args.rounds, device), precision.COLUMNS, 2),
    "unroll": Subject(lambda args, device: unroll.measure_unrolls(args.rounds, device), unroll.COLUMNS),
}


def sizes(args: argparse.Namespace, default: dict[str, tuple[str, ...]], device: torch.device) -> list[str]:
    """The sizes that were asked for, or those that suit the device."""
    return args.sizes or list(default[device.type])


def make_parser() -> argparse.ArgumentParser:
    """One subcommand for each subject, and `gpu`."""
    parser = argparse.ArgumentParser(prog="python -m launch.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, subject in SUBJECTS.items():
        module = sys.modules[f"launch.benchmark.{name}"]
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0].partition(": ")[2], description=module.__doc__)
        command.add_argument("--json", metavar="FILE", help="a file for the result")
        if name != "strategies":
            command.add_argument("--rounds", type=positive, default=subject.rounds)
    known = {"optimizer": [*optimizer.SMALL, *optimizer.SIZES], "train": list(train.BATCHES)}
    for name, choices in known.items():
        commands.choices[name].add_argument("--sizes", nargs="+", choices=choices, metavar="SIZE", help=", ".join(choices))
    commands.choices["train"].add_argument(
        "--micro-batch-size", type=positive, metavar="N", help="sequences, instead of the usual"
    )
    commands.choices["train"].add_argument("--profile", metavar="FILE", help="a file for where the time of a step goes")
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
    """Exit status 0: measured; 1: a part of `gpu` was not; 2: bad input or no GPU, said in one line."""
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    device = available_device()
    if args.what == "gpu":
        if device.type != "cuda":
            print_error("no GPU was found (torch.cuda.is_available() is false)")
            return 2
        rows = gpu.measure_gpu(Path(args.out), gpu.parts(Path(args.out)))
        print(table(rows, gpu.COLUMNS))
        return int(any(row["outcome"] != "done" for row in rows))
    subject = SUBJECTS[args.what]
    try:
        for path in (args.json, getattr(args, "profile", None)):  # refused now, or minutes are lost
            if path is not None:
                open(path, "a").close()
        result = subject.measure(args, device)
    except (ConfigError, OSError) as error:
        print_error(str(error))
        return 2
    result["command"] = shlex.join(["python", "-m", "launch.benchmark", *argv])
    print(f"{result['machine']}; {result['versions']}; {result['rounds']} rounds; {result['note']}")
    print(f"\n{table(result['rows'], subject.columns)}")
    if args.json is not None:
        Path(args.json).write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
