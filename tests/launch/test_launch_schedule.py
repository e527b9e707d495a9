"""The learning rate as a function of the step."""

from itertools import pairwise

import pytest

from configs.schema import Schedule
from launch.run.schedule import lr_factor, warmup_steps


def curve(kind, steps=100, **options):
    return [lr_factor(Schedule(kind=kind, **options), step, steps) for step in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_warmup_rises_linearly_to_the_peak(kind):
    values = curve(kind, warmup=0.1)
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(values) == 1


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("start", [0, 7])
@pytest.mark.parametrize("warmup", [0.01, 0.05, 0.1, 1.0])
def test_the_last_step_of_the_warmup_is_the_first_at_the_peak(kind, start, warmup):
    """For a run of any length it is counted, not searched for."""
    schedule = Schedule(kind=kind, warmup=warmup, start=start, decay=0.0)
    values = [lr_factor(schedule, step, 100) for step in range(start, 100)]
    assert values.index(1.0) == warmup_steps(schedule, 100) - 1
    assert warmup_steps(schedule, start + 10**15) == round(warmup * 10**15)


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
