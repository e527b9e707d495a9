"""What a training run shows on the terminal: a progress bar, or plain lines."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def show_any_text() -> None:
    """Let stdout print every character: one that its encoding lacks, as ASCII lacks é, appears as \\xe9 and raises no error."""
    if hasattr(sys.stdout, "reconfigure"):  # something else, such as a notebook's stream, may replace stdout
        sys.stdout.reconfigure(errors="backslashreplace")


class Terminal(Console):
    """A console on stdout that never stops a training run: if its reader is gone or its disk is full, lines are lost."""

    def on_broken_pipe(self) -> None:
        """The reader, such as `head`, is gone."""
        with suppress(OSError):  # a stdout without a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def say(self, text: str) -> None:
        """Print a line as it is."""
        with suppress(OSError):
            self.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


class Display:
    """A live progress bar on a terminal, or a plain line for each logged step. Other ranks than the first show nothing."""

    def __init__(self, steps: int, start: int, first: bool) -> None:
        self.steps, self.first = steps, first
        self.terminal = Terminal(file=sys.stdout)
        self.bar = Progress(
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("[progress.percentage]{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.terminal,
            disable=not (first and self.terminal.is_terminal),
        )
        self.task = self.bar.add_task("", total=steps, completed=start, text="")

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, done: int) -> None:
        """Show that `done` steps are finished."""
        self.bar.update(self.task, completed=done)

    def training(self, record: dict[str, Any]) -> None:
        """Show a training record."""
        loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
        text = f"loss {loss}  lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in record:
            text += f"  MFU {record['mfu']:.1%}"
        if self.bar.disable:
            self.say(f"step {record['step']:>6}/{self.steps}  {text}  {record['seconds']:.0f} s")
        else:
            self.bar.update(self.task, text=text)

    def evaluation(self, step: int, lines: list[str]) -> None:
        """Show what an evaluation found."""
        for line in lines:
            self.say(f"step {step:>6}/{self.steps}  {line}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.first:
            self.terminal.say(text)
