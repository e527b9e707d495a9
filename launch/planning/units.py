"""Bytes and seconds for people, with three figures."""

from __future__ import annotations


def in_unit(value: float, units: list[tuple[float, float, str]]) -> str:
    """`value` in the largest unit that it reaches; a unit is (the value from which on it is used, its size, its name)."""
    _, one, name = next((unit for unit in reversed(units) if value >= unit[0]), units[0])
    number = value / one
    digits = 0 if number >= 100 or number == int(number) else 1 if number >= 10 else 2
    return f"{number:.{digits}f} {name}"


def size(count: float) -> str:
    """Bytes."""
    return in_unit(count, [(one, one, name) for one, name in ((1, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB"))])


def duration(seconds: float) -> str:
    """Seconds."""
    small = [(1e-6, 1e-6, "us"), (1e-3, 1e-3, "ms"), (1, 1, "s")]
    return in_unit(seconds, [*small, (120, 60, "min"), (7200, 3600, "h"), (172800, 86400, "d")])


def amount(value: float) -> str:
    """A number without a unit."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
