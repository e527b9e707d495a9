"""Shared code of the small commands of `launch/`: argument types and exit status."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable

import torch
from transformers.utils import logging

from configs.load import ConfigError
from data import DataError, first_line, printable
from launch.checkpoint.verify import CheckpointError
from launch.monitoring.display import show_any_text
from launch.monitoring.signals import INTERRUPTED
from models import LossMismatch, ModelError

LARGEST = 2**63 - 1000  # the largest whole number on a command line: torch accepts it as a seed, and so SEED + 1, SEED + 2, ...


def carry_out(name: str, act: Callable[[], None]) -> int:
    """Call `act` and return the exit status: 0, 2 after an error (printed in one line after `name`), or 130 after Ctrl-C."""
    show_any_text()
    logging.disable_progress_bar()  # of transformers, for reading a file
    try:
        act()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (CheckpointError, ConfigError, DataError, LossMismatch, ModelError, OSError, RuntimeError) as error:
        print(f"{name}: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def default_device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device(text: str) -> str:
    """A type for argparse: a device that exists on this machine."""
    try:
        torch.empty(0, device=text)
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        raise argparse.ArgumentTypeError(f"device {text} does not exist on this machine ({first_line(error)})") from None
    return text


def at_least(least: int) -> Callable[[str], int]:
    """A type for argparse: an integer of at least `least`."""

    def integer(text: str) -> int:
        if not re.fullmatch("-?[0-9]+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of {least} or more")
        if int(text) > LARGEST:
            raise argparse.ArgumentTypeError(f"{text} is above {LARGEST}")
        return int(text)

    return integer


def number(least: float, most: float) -> Callable[[str], float]:
    """A type for argparse: a number in [least, most]."""

    def real(text: str) -> float:
        if not least <= (value := float(text)) <= most:
            raise argparse.ArgumentTypeError(f"{value} is not in {least:g} to {most:g}")
        return value

    return real
