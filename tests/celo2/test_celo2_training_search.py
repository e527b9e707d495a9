"""The search for hyperparameters on losses that are known."""

import math

import pytest

from celo2.training.search import (
    MARGIN,
    MOST_ROUNDS,
    Key,
    Search,
    at_the_start,
    begin,
    best,
    edge,
    grid,
    lowered,
    next_setting,
    next_value,
    open_sides,
    search,
    sensitivity,
)

LR = Key("lr", 1e-3, digits=3)


def run(optima, firsts, limit=math.inf):
    """Searches over parabolas in log lr with these optima, which diverge above `limit`; what was tried, what was said."""
    calls, said = [], []

    def evaluate(phase, wanted):
        calls.append((phase, list(wanted)))
        return [(math.inf if lr > limit else 3 + math.log2(lr / optima[label]) ** 2,) for label, (lr,) in wanted]

    searches = {label: Search((LR,)) for label in firsts}
    search(searches, {label: begin((LR,), values) for label, values in firsts.items()}, 0, evaluate, said.append)
    return searches, calls, said


def test_grid():
    assert grid(1e-3, 5) == [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    assert grid(1e-3, 4) == [5e-4, 1e-3, 2e-3, 4e-3]
    assert grid(3e-4, 1) == [3e-4]


def test_edges_and_what_comes_next():
    key = Key("lr", 1.0, digits=3)
    assert edge(key, {1: 5.0, 2: 4.0, 4: 6.0}, 2) is None
    assert edge(key, {1: 3.0, 2: 4.0}, 1) == "below" and next_value(key, {1: 3.0, 2: 4.0}, 1) == 0.5
    assert edge(key, {1: 5.0, 2: 4.0}, 2) == "above" and next_value(key, {1: 5.0, 2: 4.0}, 2) == 4
    assert next_value(key, {1: 5.0, 10: 4.0}, 10) == 100  # the grid's own step
    assert next_value(key, {1: 4.5, 2: 4.0, 4: 6.0}, 2) == 2.83
    assert next_value(key, {1: 4.5, 2: 4.0, 2.83: 5.0, 4: 6.0}, 2) == 1.41  # the wider interval
    assert next_value(key, {1: 5.0, 2: 4.0, 4: math.inf}, 2) == 1.41  # bracketed by divergence
    assert next_setting([key], {(1,): math.inf, (2,): math.inf}) == (0.5,) and open_sides([key], {(1,): math.inf}) == {
        "lr": "below"
    }
    assert best({(1,): math.inf}) is None
    final = Key("final", 0.1, values=(0.0, 0.1, 0.3))
    assert edge(final, {0.1: 2.0}, 0.1) == "above" and next_value(final, {0.1: 2.0}, 0.1) == 0.3
    assert next_value(final, {0.1: 2.0, 0.3: 3.0}, 0.1) == 0.0 and edge(final, {0.0: 1.0, 0.1: 2.0}, 0.0) is None
    assert next_setting([final], {(0.0,): 1.0, (0.1,): 2.0, (0.3,): 3.0}) is None


def test_a_bracketed_search_ends_at_once():
    searches, calls, said = run({"a": 1e-3, "b": 2e-3}, {"a": grid(1e-3, 5), "b": grid(1e-3, 5)})
    assert len(calls) == 1 and not said
    assert searches["a"].value("lr") == 1e-3 and searches["b"].value("lr") == 2e-3
    assert searches["a"].trials == searches["b"].trials == 5


def test_everybody_gets_as_many_trials_as_the_one_at_the_edge():
    searches, calls, said = run({"near": 1e-3, "far": 3e-2}, {"near": grid(1e-3, 3), "far": grid(1e-3, 3)})
    assert searches["near"].trials == searches["far"].trials == 3 + len(calls) - 1
    assert searches["far"].value("lr") == pytest.approx(0.032)
    assert not open_sides((LR,), searches["far"].tried)
    assert len(said) == 2 * (len(calls) - 1)
    assert "its best lr, 0.002, is at the edge of its grid: tries 0.004 above it" in said[1]
    assert "beside its best, for the same budget" in said[0]
    assert abs(math.log2(searches["near"].value("lr") / 1e-3)) < 0.01  # the refinement found nothing better than the optimum


def test_divergence_moves_the_grid_down():
    searches, _, said = run({"a": 1e-4, "b": 1e-4}, {"a": grid(1e-2, 3), "b": grid(1e-4, 3)}, limit=3e-3)
    assert "every trial diverged: tries lr 0.0025 below them" in said[0]
    assert searches["a"].value("lr") < 3e-3 and searches["a"].trials == searches["b"].trials


def test_a_search_that_never_ends_says_so():
    searches, calls, said = run({"a": 1e3}, {"a": grid(1e-3, 2)})
    assert len(calls) == 1 + MOST_ROUNDS
    assert f"still at the edge after {MOST_ROUNDS} extensions" in said[-1] and said[-1] == "a: " + searches["a"].notes[-1]
    searches, _, said = run({"a": 1.0}, {"a": grid(1.0, 2)}, limit=0)
    assert searches["a"].chosen is None and "every lr that was tried diverged" in said[-1]


def test_all_keys_at_an_edge_are_named_at_once():
    """The loss falls with both for ever, faster with lr, which gets all of the trials."""
    keys = (Key("lr", 1.0, digits=3), Key("weight_decay", 1.0, digits=3))
    searches, said = {"a": Search(keys)}, []
    evaluate = lambda _, wanted: [(1 / (s[1] * s[0] ** 2),) for _, s in wanted]  # noqa: E731
    search(searches, {"a": begin(keys, [1.0])}, 1, evaluate, said.append)
    (first, *_, last), notes = said, searches["a"].notes
    assert first == "a: its best lr, 1, is at the edge of its grid (so is its best weight_decay, 1): tries 2 above it"
    assert last == "a: " + notes[-1] and "still" not in notes[-2]
    assert notes[-1] == (
        f"its best lr and weight_decay are still at the edge after {MOST_ROUNDS} extensions: "
        "values above 64 and above 1 may be better"
    )


KEYS = (Key("lr", 1e-3, digits=3), Key("adamw_lr", 3e-3, 4.0, digits=3), Key("weight_decay", 0.1, 4.0, digits=3))
BEST = (3e-3, 2e-2, 0.03)


def bowl(setting):
    """Steeper above than below in lr; a larger lr wants a smaller decay."""
    a, b, c = (math.log2(x / y) for x, y in zip(setting, BEST, strict=True))
    return 3 + 0.02 * (math.exp(0.4 * a) - 0.4 * a - 1) / 0.08 + 0.005 * b**2 + 0.004 * c**2 + 0.004 * math.tanh(a) * c


def test_a_joint_search_finds_the_bottom_with_as_many_trials_for_all():
    """From 0.084 nats above it to below 0.005, which is about what a seed changes, in 18 trials."""
    searches = {"a": Search(KEYS), "two keys": Search(KEYS[:2])}
    asked = []

    def evaluate(phase, wanted):
        asked.append((phase, len(wanted)))
        return [(bowl((*setting, 0.1)[:3]), bowl((*setting, 0.1)[:3])) for _, setting in wanted]

    search(searches, {label: begin(s.keys, grid(1e-3, 3)) for label, s in searches.items()}, 18, evaluate, lambda _: None)
    a = searches["a"]
    assert a.trials == searches["two keys"].trials >= 18
    assert a.tried[a.start] - 3 > 0.08 and a.tried[a.chosen] - 3 < 0.005
    assert asked[0] == ("search", 6) and asked[1] == ("search, trial 4 of 18", 2)
    assert at_the_start(a) == {key.name: (*a.chosen[:i], key.first, *a.chosen[i + 1 :]) for i, key in enumerate(KEYS)}
    again = Search(KEYS)  # the same losses lead the same way, so that a search continues from its trials alone
    search({"a": again}, {"a": begin(KEYS, grid(1e-3, 3))}, 18, lambda _, w: [(bowl(x),) for _, x in w], lambda _: None)
    assert list(again.tried)[:18] == list(a.tried)[:18]


def test_lower_rates_that_are_not_told_apart():
    """One key after the other, each along the line of what was taken so far; only the named ones, and nothing that was given."""
    keys = (Key("lr", 1.0), Key("adamw_lr", 1.0), Key("weight_decay", 1.0))
    losses = {(4.0, 4.0, 1.0): 3.0, (2.0, 4.0, 1.0): 3.01, (1.0, 4.0, 1.0): 3.03, (8.0, 4.0, 1.0): 3.001}
    losses |= {(4.0, 2.0, 1.0): 3.005, (2.0, 2.0, 1.0): 3.02, (2.0, 1.0, 1.0): 3.015, (4.0, 4.0, 0.5): 3.001}
    s = Search(keys, {setting: (loss - 0.1, loss + 0.1) for setting, loss in losses.items()})
    assert s.chosen == (4.0, 4.0, 1.0) == lowered(s, ("lr", "adamw_lr"), 0.0)
    assert lowered(s, ("lr", "adamw_lr"), 0.0155) == (2.0, 1.0, 1.0) and lowered(s, ("adamw_lr",), 0.0155) == (4.0, 2.0, 1.0)
    assert lowered(s, ("lr", "adamw_lr", "weight_decay"), 0.0021) == (4.0, 4.0, 0.5)
    s.given = (8.0, 4.0, 1.0)
    assert lowered(s, ("lr", "adamw_lr"), 1.0) == s.given
    with pytest.raises(ValueError, match="every trial diverged"):
        lowered(Search(keys, {(1.0, 1.0, 1.0): (math.inf,)}), ("lr",), 0.0)


def test_sensitivity_of_a_parabola():
    """Loss 0.01 log2² along lr: a factor of two costs 0.01 in both directions, which is the margin."""
    key, flat = Key("lr", 1.0), Key("final", 0.1, values=(0.0, 0.1))
    tried = {(2.0**i, 0.1): 3 + 0.01 * i**2 for i in range(-2, 2)} | {(1.0, 0.0): 3.5}
    lr, final = sensitivity((key, flat), tried, (1.0, 0.1))
    assert (lr.doubled, lr.halved) == pytest.approx((0.01, 0.01)) and MARGIN == 0.01
    assert (lr.low, lr.high) == pytest.approx((0.5, 2.0))
    assert final.curve == [(0.0, 3.5), (0.1, 3.0)] and final.doubled is None
    (narrow,) = sensitivity((key,), {(1.0,): 3.0, (1.5,): 3.001, (0.5,): math.inf}, (1.0,))
    assert (narrow.doubled, narrow.halved, narrow.low, narrow.high) == (None, None, None, None)
