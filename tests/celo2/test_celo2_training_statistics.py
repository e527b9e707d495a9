"""Student's t and the tests built on it, against tables and worked examples."""

import math

import pytest

from celo2.training.statistics import (
    CONFIDENCE,
    detectable,
    difference,
    estimate,
    half_width,
    holm,
    p_value,
    power,
    seeds_needed,
)


# Two-sided quantiles as every table prints them; 1 degree of freedom is the Cauchy distribution, tan(pi confidence / 2).
@pytest.mark.parametrize(
    ("dof", "expected"),
    [(1, math.tan(math.pi * 0.475)), (2, 4.302653), (4, 2.776445), (10, 2.228139), (30, 2.042272), (1000, 1.962339)],
)
def test_quantiles(dof, expected):
    assert half_width(1.0, dof) == pytest.approx(expected, rel=1e-6)
    assert half_width(0.2, dof) == pytest.approx(0.2 * expected, rel=1e-6)
    assert p_value(expected, 1.0, dof) == pytest.approx(1 - CONFIDENCE, rel=1e-5)


def test_p_values():
    for t in (0.01, 0.5, 3.0, 40.0):  # closed forms
        assert p_value(t, 1.0, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-12)
        assert p_value(-2 * t, 2.0, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
    assert p_value(5.840909, 1.0, 3) == pytest.approx(0.01, rel=1e-5)  # from tables
    assert p_value(0.711142, 1.0, 7) == pytest.approx(0.5, rel=1e-5)
    assert p_value(0.0, 1.0, 5) == 1 == p_value(0.0, 0.0, 5) and p_value(1.0, 0.0, 5) == 0


def test_estimate():
    e = estimate([1.0, 2.0, 3.0])
    assert (e.mean, e.sd, e.n) == (2.0, 1.0, 3)
    assert e.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert estimate([5.0]).half is None


def test_pairing_takes_out_what_the_seeds_share():
    a, b = {1: 3.00, 2: 3.50, 3: 4.00}, {1: 3.10, 2: 3.61, 3: 4.09}
    paired = difference(a, b)
    assert paired.paired and paired.n == 3 and paired.mean == pytest.approx(-0.1)
    assert paired.half == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-6)
    assert paired.p == pytest.approx(p_value(0.1, 0.01 / math.sqrt(3), 2)) and paired.p < 0.01
    unpaired = difference(a, {11: 3.10, 12: 3.61, 13: 4.09})
    assert not unpaired.paired and unpaired.p > 0.8


def test_welch():
    """The same numbers in a textbook's way: s1²/n1 + s2²/n2 and the Welch-Satterthwaite degrees of freedom."""
    a, b = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}, {11: 6.0, 12: 8.0}
    u, v = (5 / 3) / 4, 2 / 2
    dof = (u + v) ** 2 / (u**2 / 3 + v**2 / 1)
    d = difference(a, b)
    assert d.mean == -4.5 and d.n == 2
    assert d.half == pytest.approx(half_width(math.sqrt(u + v), dof))
    assert d.p == pytest.approx(p_value(4.5, math.sqrt(u + v), dof))


def test_no_test_where_no_spread_is_known():
    assert difference({1: 3.0}, {1: 3.5}).p is None
    assert difference({1: 3.0}, {2: 3.5}).p is None
    assert difference({1: 3.0, 2: 3.1}, {5: 3.5}).p is None
    assert difference({1: 3.0, 2: 3.1}, {1: 3.0, 2: 3.1}).p == 1.0
    assert difference({1: 3.0, 2: 3.0}, {11: 3.0, 12: 3.0}).p == 1.0


def test_holm():
    assert holm([0.01, 0.04, 0.03, None]) == pytest.approx([0.03, 0.06, 0.06, None])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([None]) == [None]


def test_no_more_false_claims_than_promised():
    """Two optimizers of the same distribution, 3 seeds: a claim in 5 % of 2,000 comparisons (standard deviation 0.5 %)."""
    import random

    generator = random.Random(0)
    draw = lambda: {seed: generator.gauss(3, 0.01) for seed in range(3)}  # noqa: E731
    false = sum(difference(draw(), draw()).p < 0.05 for _ in range(2000)) / 2000
    assert 0.035 < false < 0.065  # measured 0.044


def test_power_of_tables():
    """Paired t-test at 0.05, two-sided: Cohen's d of 0.5 takes 34 pairs for 80 % power, 0.8 takes 15, 0.2 takes 199."""
    assert [seeds_needed(d, 1.0) for d in (0.5, 0.8, 0.2)] == [34, 15, 199]
    assert power(0.5, 1.0, 34) == pytest.approx(0.808, abs=1e-3) and power(0.0, 1.0, 9) == pytest.approx(0.05)
    assert detectable(34) == pytest.approx(0.4949, abs=1e-3) and detectable(1) is None
    assert seeds_needed(1e-9, 1.0) is None and seeds_needed(1.0, 0.0) == 2 and power(1.0, 1.0, 1) == 0


def test_power_is_what_a_simulation_finds():
    """4 seeds, a difference of twice its SD: 2,000 t-tests (SD of the share 1 %)."""
    import random

    generator = random.Random(0)
    draw = lambda shift: {seed: generator.gauss(shift, 1.0) for seed in range(4)}  # noqa: E731
    zero = dict.fromkeys(range(4), 0.0)
    found = sum(difference(draw(2.0), zero).p < 0.05 for _ in range(2000)) / 2000
    assert found == pytest.approx(power(2.0, 1.0, 4), abs=0.035)
