"""The learning-rate search on losses that are known."""

import math

import pytest

from launch.compare.search import MOST_ROUNDS, best, edge, grid, next_lr, search


def run(optima, grids, limit=math.inf):
    """Searches over parabolas in log lr with these optima, which diverge above `limit`; what was tried, what was said."""
    calls, said = [], []

    def evaluate(phase, wanted):
        calls.append((phase, list(wanted)))
        return [math.inf if lr > limit else 3 + math.log2(lr / optima[label]) ** 2 for label, lr in wanted]

    return search(grids, evaluate, said.append), calls, said


def test_grid():
    assert grid(1e-3, 5) == [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    assert grid(1e-3, 4) == [5e-4, 1e-3, 2e-3, 4e-3]
    assert grid(3e-4, 1) == [3e-4]


def test_edges_and_what_comes_next():
    assert edge({1: 5.0, 2: 4.0, 4: 6.0}) is None
    assert edge({1: 3.0, 2: 4.0}) == "below" and next_lr({1: 3.0, 2: 4.0}) == 0.5
    assert edge({1: 5.0, 2: 4.0}) == "above" and next_lr({1: 5.0, 2: 4.0}) == 4
    assert next_lr({1: 5.0, 10: 4.0}) == 100  # the grid's own step
    assert next_lr({1: 4.5, 2: 4.0, 4: 6.0}) == pytest.approx(1.41)
    assert edge({1: 5.0, 2: 4.0, 4: math.inf}) is None  # bracketed by divergence
    assert next_lr({1: 5.0, 2: 4.0, 4: math.inf}) == pytest.approx(1.41)
    assert edge({1: math.inf, 2: math.inf}) == "below" and next_lr({1: math.inf, 2: math.inf}) == 0.5
    assert best({1: math.inf}) is None


def test_a_bracketed_search_ends_at_once():
    searches, calls, said = run({"a": 1e-3, "b": 2e-3}, {"a": grid(1e-3, 5), "b": grid(1e-3, 5)})
    assert len(calls) == 1 and not said
    assert searches["a"].lr == 1e-3 and searches["b"].lr == 2e-3
    assert searches["a"].trials == searches["b"].trials == 5


def test_everybody_gets_as_many_trials_as_the_one_at_the_edge():
    searches, calls, said = run({"near": 1e-3, "far": 3e-2}, {"near": grid(1e-3, 3), "far": grid(1e-3, 3)})
    assert searches["near"].trials == searches["far"].trials == 3 + len(calls) - 1
    assert searches["far"].lr == pytest.approx(0.032)
    assert edge(searches["far"].losses) is None
    assert len(said) == 2 * (len(calls) - 1)
    assert "at the edge of its grid: tries 0.004 above it" in said[1]
    assert "beside its best, for the same budget" in said[0]
    assert abs(math.log2(searches["near"].lr / 1e-3)) < 0.01  # the refinement found nothing better than the optimum


def test_divergence_moves_the_grid_down():
    searches, _, said = run({"a": 1e-4, "b": 1e-4}, {"a": grid(1e-2, 3), "b": grid(1e-4, 3)}, limit=3e-3)
    assert "every trial diverged: tries 0.0025 below it" in said[0]
    assert searches["a"].lr < 3e-3 and searches["a"].trials == searches["b"].trials


def test_a_search_that_never_ends_says_so():
    searches, calls, said = run({"a": 1e3}, {"a": grid(1e-3, 2)})
    assert len(calls) == 1 + MOST_ROUNDS
    assert f"still at the edge after {MOST_ROUNDS} extensions" in said[-1] and said[-1] == "a: " + searches["a"].notes[-1]
    searches, _, said = run({"a": 1.0}, {"a": grid(1.0, 2)}, limit=0)
    assert searches["a"].lr is None and "every learning rate that was tried diverged" in said[-1]


def test_one_learning_rate_is_no_search():
    searches, calls, _ = run({"a": 1e-3, "b": 1e-3}, {"a": [0.5], "b": [0.5]})
    assert not calls and searches["a"].lr == 0.5 and searches["a"].trials == 0


def test_adamw_lr_only_where_it_is_better():
    searches, _, _ = run({"a": 1e-3}, {"a": grid(1e-3, 3)})
    s = searches["a"]
    assert s.adamw_lr is None
    s.adamw = {1e-2: 3.5, 1e-3: 3.2}
    assert s.adamw_lr is None
    s.adamw[5e-3] = 2.9
    assert s.adamw_lr == 5e-3 and s.trials == 6
