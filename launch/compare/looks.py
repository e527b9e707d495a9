"""Color, dashes and marks of an optimizer. Its name decides them, so that they are the same in every report."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

COLORS, DASHES, MARKS = 8, 7, 7  # how many there are, in page.css, chart.js and picture.py
# Known names; those of a family share a color.
KNOWN = {
    "celo2": 0, "adamw": 1, "muon": 2, "soap": 3, "lion": 4, "celo2-base": 5, "schedule-free": 6, "adafactor": 7,
    "celo2-lm": 8, "ademamix": 9, "normuon": 10, "kron": 11, "mars": 12, "scion": 18,
}  # fmt: skip


class Look(NamedTuple):
    """Numbers of a color, dashes and a mark."""

    color: int
    dash: int
    mark: int


def looks_of(labels: Iterable[str]) -> dict[str, Look]:
    """The look of each label. The name alone decides the color. It also decides dashes and mark, unless two would look alike."""
    found: dict[str, Look] = {}
    for label in labels:
        number = KNOWN.get(label, int.from_bytes(hashlib.sha256(label.encode()).digest()[:4], "big") % (COLORS * DASHES))
        wanted = [look(number + COLORS * i) for i in range(DASHES)]  # one color
        found[label] = next((one for one in wanted if one not in found.values()), wanted[0])
    return found


def look(number: int) -> Look:
    """The look with a number; 56 numbers in a row look different."""
    return Look(number % COLORS, number // COLORS % DASHES, number % MARKS)
