"""The learning rate as a function of the step."""

from itertools import pairwise

import pytest

from configs.schema import Schedule
from launch.run.schedule import lr_factor


def curve(kind, steps=100, **options):
    return [lr_factor(Schedule(kind=kind, **options), step, steps) for step in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_warmup_rises_linearly_to_the_peak(kind):
    values = curve(kind, warmup=0.1)
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(values) == 1


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_decay_ends_at_final_in_the_last_step(kind):
    values = curve(kind, warmup=0.1, final=0.25)
    assert values[-1] == pytest.approx(0.25)
    assert all(a >= b for a, b in pairwise(values[9:]))


def test_shapes():
    assert curve("cosine", warmup=0.0, final=0.0)[49] == pytest.approx(0.5)
    assert curve("linear", warmup=0.0, final=0.0)[24] == pytest.approx(0.75)
    assert curve("constant", warmup=0.0) == [1.0] * 100
    wsd = curve("wsd", warmup=0.1, decay=0.2, final=0.0)
    assert wsd[10:80] == [1.0] * 70
    assert wsd[89] == pytest.approx(0.5)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_the_shortest_runs(kind, steps):
    for warmup in (0.0, 0.5, 1.0):
        assert all(0 < value <= 1 for value in curve(kind, steps=steps, warmup=warmup))
