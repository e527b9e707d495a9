"""Shows the progress of a preparation: a bar on a terminal, else a line every ten seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

LINE_SECONDS = 10


@contextmanager
def progress(units: dict[int, int], log: Callable[[str], None]) -> Iterator[Callable[..., None]]:
    """Yield update(tokens, unit=None), which adds encoded tokens and marks `unit` as done. `units`: unit -> bytes of text."""
    begun = last = time.monotonic()
    done = total = 0
    by_bytes = any(units.values())  # the bytes of a hub data set are unknown
    with _bar(sum(units.values()) if by_bytes else len(units)) if sys.stderr.isatty() else nullcontext() as advance:

        def update(tokens: int, unit: int | None = None) -> None:
            nonlocal done, total, last
            done += unit is not None
            total += tokens
            now = time.monotonic()
            line = f"{done}/{len(units)} units, {total:,} tokens, {total / max(now - begun, 1e-9) / 1e6:.2f} M tokens/s"
            if advance is not None:
                advance(0 if unit is None else units[unit] if by_bytes else 1, line)
            elif now - last >= LINE_SECONDS:
                last = now
                log(f"tokenizing: {line}")

        yield update


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int, str], None]]:
    """Yield advance(by, line) for a bar that ends at `total`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = ("tokenizing", BarColumn(), "{task.percentage:>3.0f}%", TextColumn("{task.fields[done]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=total, done="")
        yield lambda by, line: bars.update(task, advance=by, done=line)
