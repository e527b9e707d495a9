"""`python -m launch.benchmark SUBJECT`: measure one subject, print a table, and write it as JSON when asked."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType

import torch

from configs.load import ConfigError
from launch.benchmark import gpu, loss, memory, optimizer, options, precision, save, search, strategies, train, unroll
from launch.benchmark.measure import available_device, environment, table
from launch.command import at_least
from launch.distributed.heartbeat import print_error

SUBJECTS = (optimizer, train, options, loss, save, memory, strategies, precision, unroll, search)


def make_parser(device: torch.device) -> argparse.ArgumentParser:
    """One subcommand for each subject, and `gpu`. The default sizes suit `device`."""
    parser = argparse.ArgumentParser(prog="python -m launch.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for subject in SUBJECTS:
        first_line, text = (subject.__doc__ or "").splitlines()[0], subject.__doc__
        command = commands.add_parser(name_of(subject), help=first_line.partition(": ")[2], description=text)
        command.set_defaults(subject=subject)
        command.add_argument("--json", metavar="FILE", help="file for the result")
        if subject.ROUNDS is not None:
            command.add_argument("--rounds", type=at_least(1), default=subject.ROUNDS)
        if hasattr(subject, "add_options"):
            subject.add_options(command, device)
    command = commands.add_parser("gpu", help="run every subject that needs a GPU, within ten minutes", description=gpu.__doc__)
    command.add_argument("--out", metavar="DIR", required=True, help="folder for all results")
    return parser


def name_of(subject: ModuleType) -> str:
    """What a subject is called on the command line."""
    return subject.__name__.rpartition(".")[2]


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
    try:
        for path in (args.json, getattr(args, "profile", None)):  # an error now saves the minutes of measuring
            if path is not None:
                open(path, "a", encoding="utf-8").close()
        note, rows = args.subject.measure(args, device)
    except (ConfigError, OSError) as error:
        print_error(str(error))
        return 2
    where = environment(device) | {"rounds": getattr(args, "rounds", 1), "note": note}
    print(f"{where['machine']}; {where['versions']}; {where['rounds']} rounds; {note}\n\n{table(rows, args.subject.COLUMNS)}")
    if args.json is not None:
        command = shlex.join(["python", "-m", "launch.benchmark", *argv])
        result = where | {"rows": rows, "command": command}
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
