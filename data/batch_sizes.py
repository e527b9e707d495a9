"""How many sequences each step takes: one number, or a ramp of numbers from given steps on. A pure function of the step."""

from bisect import bisect_right
from collections.abc import Mapping


class BatchSizes:
    """`first` sequences in a step, and from each step of `ramp` on as many as it says. Steps count from 0; `ramp` has none.

    >>> BatchSizes(8, {100: 16}).between(99, 102)
    40
    """

    def __init__(self, first: int, ramp: Mapping[int, int] | None = None):
        self.steps, self.sizes = [0], [first]  # from each of these steps on, so many
        for step, size in sorted((ramp or {}).items()):
            if size != self.sizes[-1]:
                self.steps.append(step)
                self.sizes.append(size)

    def at(self, step: int) -> int:
        """Sequences of a step."""
        return self.sizes[bisect_right(self.steps, step) - 1]

    def between(self, start: int, stop: int) -> int:
        """Sequences of the steps [start, stop); below 0 where stop comes first."""
        return self._before(stop) - self._before(start)

    def steps_for(self, sequences: int) -> int:
        """The fewest steps that take at least `sequences` sequences."""
        begin = max((step for step in self.steps if self._before(step) < sequences), default=0)
        return begin + -(-(sequences - self._before(begin)) // self.at(begin))

    def after(self, step: int) -> list[tuple[int, int]]:
        """(from which step on, how many), from `step` on: equal for ramps that do not differ any more."""
        later = [(s, size) for s, size in zip(self.steps, self.sizes, strict=True) if s > step]
        return [(step, self.at(step)), *later]

    def text(self, unit: str = "") -> str:
        """For a person: "8, 16 from step 100 on"; with a unit "8 sequences, 16 from step 100 on"."""
        pairs = zip(self.steps, self.sizes, strict=True)
        return ", ".join(f"{size} from step {step} on" if step else f"{size} {unit}".strip() for step, size in pairs)

    def _before(self, step: int) -> int:
        """Sequences of all steps before `step`."""
        stops = [*self.steps[1:], step]
        return sum(
            size * max(0, min(stop, step) - start) for start, stop, size in zip(self.steps, stops, self.sizes, strict=True)
        )
