"""The batch size of each step, in sequences: one number, or a ramp that changes at given steps. A pure function of the step."""

from bisect import bisect_right
from collections.abc import Mapping


class BatchSizes:
    """Batch sizes: `first` sequences, and from each step in `ramp` on that step's number. Steps count from 0; `ramp` lacks 0.

    >>> BatchSizes(8, {100: 16}).between(99, 102)
    40
    """

    def __init__(self, first: int, ramp: Mapping[int, int] | None = None):
        self.steps, self.sizes = [0], [first]  # `sizes[i]` applies from step `steps[i]` on
        for step, size in sorted((ramp or {}).items()):
            if size != self.sizes[-1]:
                self.steps.append(step)
                self.sizes.append(size)

    def at(self, step: int) -> int:
        """Return the sequences of a step."""
        return self.sizes[bisect_right(self.steps, step) - 1]

    def between(self, start: int, stop: int) -> int:
        """Return the sequences of the steps [start, stop); negative if `stop` is before `start`."""
        return self._before(stop) - self._before(start)

    def steps_for(self, sequences: int) -> int:
        """Return the smallest number of steps that takes at least `sequences` sequences."""
        begin = max((step for step in self.steps if self._before(step) < sequences), default=0)
        return begin + -(-(sequences - self._before(begin)) // self.at(begin))

    def after(self, step: int) -> list[tuple[int, int]]:
        """Return the sizes from `step` on as (step, size) pairs. They are equal if two ramps do not differ from `step` on."""
        later = [(s, size) for s, size in zip(self.steps, self.sizes, strict=True) if s > step]
        return [(step, self.at(step)), *later]

    def text(self, unit: str = "") -> str:
        """Return a text: "8, 16 from step 100 on"; with a unit: "8 sequences, 16 from step 100 on"."""
        pairs = zip(self.steps, self.sizes, strict=True)
        return ", ".join(f"{size} from step {step} on" if step else f"{size} {unit}".strip() for step, size in pairs)

    def _before(self, step: int) -> int:
        """Return the sequences of all steps before `step`."""
        stops = [*self.steps[1:], step]
        return sum(
            size * max(0, min(stop, step) - start) for start, stop, size in zip(self.steps, stops, self.sizes, strict=True)
        )
