import numpy as np
import pytest

from data.order import sequence_ids

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 10**6]


def epochs(seed: int, n: int, count: int) -> np.ndarray:
    """The first `count` epochs of n sequences: (count, n)."""
    return sequence_ids(seed, 0, n * count, n).reshape(count, n)


def deviations(counts: np.ndarray, freedom: int) -> float:
    """Standard deviations of the chi-square statistic of equally likely `counts` from its mean."""
    expected = counts.mean()
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("n", SIZES)
def test_every_sequence_once_an_epoch(n):
    for row in epochs(3, n, 1 if n > 10**4 else 3):
        assert np.array_equal(np.sort(row), np.arange(n))


def test_known_values():
    """The same on every platform and in every version: a resumed run must read on."""
    assert sequence_ids(0, 0, 8, 1000).tolist() == [404, 729, 623, 343, 661, 703, 586, 465]
    assert sequence_ids(1234, 5 * 10**9, 5, 10**7).tolist() == [5322652, 4711539, 445137, 534448, 7834660]


@pytest.mark.parametrize("n", [10, 1000])
def test_only_the_counter_matters(n):
    small = np.concatenate([sequence_ids(7, 6 * step, 6, n) for step in range(40)])
    large = np.concatenate([sequence_ids(7, 24 * step, 24, n) for step in range(10)])
    assert np.array_equal(small, large)
    assert small.dtype == np.int64


def test_seeds_and_epochs_differ():
    first = sequence_ids(0, 0, 1000, 1000)
    for seed in (1, 2, -1, 2**32, 2**63):
        assert (sequence_ids(seed, 0, 1000, 1000) == first).mean() < 0.01
    assert (sequence_ids(0, 1000, 1000, 1000) == first).mean() < 0.01


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_are_equally_likely(n):
    orders, counts = np.unique(epochs(1, n, 20_000), axis=0, return_counts=True)
    factorial = {2: 2, 3: 6, 4: 24, 5: 120}[n]
    assert len(orders) == factorial
    assert abs(deviations(counts, factorial - 1)) < 4  # these four: at most 1.5


@pytest.mark.parametrize("n", [7, 13, 16, 100])
def test_every_place_gets_every_sequence_equally_often(n):
    rows = epochs(2, n, 20_000)
    counts = np.stack([np.bincount(rows[:, place], minlength=n) for place in range(n)])
    assert abs(deviations(counts, (n - 1) ** 2)) < 4  # these four: at most 2


def test_first_sequence_over_seeds_is_uniform():
    counts = np.bincount([sequence_ids(seed, 0, 1, 10)[0] for seed in range(1000)], minlength=10)
    assert abs(deviations(counts, 9)) < 4


def test_no_correlation_between_epochs_or_neighbours():
    n = 4096
    rows = epochs(5, n, 40).astype(float)
    between = [np.corrcoef(rows[i], rows[j])[0, 1] for i in range(40) for j in range(i)]
    assert np.abs(between).max() < 4.5 / np.sqrt(n)  # 780 of them
    assert abs(np.mean(between)) < 4 / np.sqrt(n * len(between))
    neighbours = [np.corrcoef(row[:-1], row[1:])[0, 1] for row in rows]
    assert np.abs(neighbours).max() < 4 / np.sqrt(n)
    assert (np.abs(np.diff(rows, axis=1)) == 1).mean() < 4 / n  # 2 / n in a random order


def test_long_runs_and_bad_arguments():
    assert sequence_ids(0, 4096 * 10**12, 4096, 10**9).max() < 10**9
    for first, count, n in ((-1, 1, 1), (0, 0, 1), (0, 1, 0)):
        with pytest.raises(ValueError, match="out of range"):
            sequence_ids(0, first, count, n)
