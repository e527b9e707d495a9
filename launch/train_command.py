"""The command line of train.py: arguments, one-line errors, exit status."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable

from celo2 import RuleError, ShardingError
from celo2.training.configuration import help_text, parse_arguments
from configs.load import ConfigError, load_written
from configs.schema import Config
from data import DataError
from launch.checkpoint.verify import CheckpointError
from launch.distributed.environment import check_environment
from launch.distributed.heartbeat import STATUS, RankError, print_error
from launch.monitoring.display import show_any_text
from launch.monitoring.guard import Diverged
from launch.monitoring.launcher import say_after_launcher
from launch.monitoring.signals import AT_ONCE, INTERRUPTED, StopSignals
from launch.planning.machines import machine_of
from launch.planning.plan import make_plan
from launch.run.branch import config_to_plan
from launch.run.check import check
from launch.run.mixture import fetch_data
from launch.run.pinned_rule import with_pinned_rule
from launch.run.setup import run_folder
from models import LossMismatch, ModelError

# Errors that the user can fix: bad input, a full disk, a run that diverged. Each is printed in one line.
EXPECTED_ERRORS = (
    ConfigError,
    DataError,
    ModelError,
    LossMismatch,
    RuleError,
    CheckpointError,
    Diverged,
    ShardingError,
    OSError,
    UnicodeError,  # a path that the file system's encoding cannot represent
)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return the argument parser of train.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, such as configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    parser.add_argument("--plan", action="store_true", help="print parameters, routing, tokens, FLOPs, memory and time, and stop")
    parser.add_argument(
        "--gpu", metavar="NAME", help="with --plan: h100 (default), h200, b200, a100, ... (launch/planning/machines.py)"
    )
    parser.epilog = help_text(Config)
    return parser


def command(argv: list[str] | None, description: str | None, train: Callable[[Config, StopSignals], int]) -> int:
    """Check the configuration, then print the plan or train.

    Returns the exit status. 0: done. 2: bad input, or the run cannot continue; one line gives the reason. 70: another rank died,
    hangs or failed. 75: stopped by a signal after saving a checkpoint. 130: stopped at once by a signal.
    """
    if threading.current_thread() is not threading.main_thread():
        print_error(
            "training must run in the main thread, since only that thread receives signals: call it there, or start train.py"
        )
        return 2
    show_any_text()
    rank = os.environ.get("RANK", "0")
    with StopSignals() as signals:  # until the last line is printed
        try:
            args = parse_arguments(parser_of(description), argv)
            config, written = load_written(args.config, args.overrides)
            world = check_environment(config)
            if args.plan and "RANK" not in os.environ:
                world = config.distributed.replicas  # no launcher: plan for the smallest possible number of processes
            notes = check(config, written, world)
            if rank == "0":
                print("".join(f"note: {note}\n" for note in notes), end="", file=sys.stderr)
            if args.plan:
                config = config_to_plan(config, run_folder(config))
                plan = make_plan(with_pinned_rule(config), world, machine_of(args.gpu or "h100"))
                if rank == "0":
                    print(plan)
                return 0
            if args.gpu:
                raise ConfigError("--gpu is for --plan; training uses the GPUs of this machine")
            fetch_data(config)
            return train(config, signals)
        except EXPECTED_ERRORS as error:
            print_error(str(error) if rank == "0" else f"rank {rank}: {error}")
            return 2
        except RankError as error:
            print_error(str(error))
            return STATUS
        except KeyboardInterrupt:
            if rank == "0":
                print_error(AT_ONCE)
                say_after_launcher(AT_ONCE)
            return INTERRUPTED
