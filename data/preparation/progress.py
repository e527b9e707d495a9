"""How far a preparation is: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_SECONDS = 10


@contextmanager
def progress(units: dict[int, int], log: Callable[[str], None]) -> Iterator[Callable[[int, int], None]]:
    """Yields update(i, n): unit i (`units` has its bytes), or none if -1, is done, and n more tokens."""
    if sys.stderr.isatty():
        with _bar(units) as update:
            yield update
    else:
        yield _lines(units, log)


@contextmanager
def _bar(units: dict[int, int]) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = ("tokenizing", BarColumn(), "{task.percentage:>3.0f}%", TextColumn("{task.fields[done]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=sum(units.values()) or len(units), done="")
        state = _State(units)

        def update(i: int, tokens: int) -> None:
            state.add(i, tokens)
            weight = (units[i] if any(units.values()) else 1) if i >= 0 else 0
            bars.update(task, advance=weight, done=state.line())

        yield update


def _lines(units: dict[int, int], log: Callable[[str], None]) -> Callable[[int, int], None]:
    state = _State(units)
    last = time.monotonic()

    def update(i: int, tokens: int) -> None:
        nonlocal last
        state.add(i, tokens)
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            log(f"tokenizing: {state.line()}")

    return update


class _State:
    def __init__(self, units: dict[int, int]):
        self.total, self.done, self.tokens, self.begun = len(units), 0, 0, time.monotonic()

    def add(self, i: int, tokens: int) -> None:
        self.done += i >= 0
        self.tokens += tokens

    def line(self) -> str:
        rate = self.tokens / max(time.monotonic() - self.begun, 1e-9)
        return f"{self.done}/{self.total} units, {self.tokens:,} tokens, {rate / 1e6:.2f} M tokens/s"
