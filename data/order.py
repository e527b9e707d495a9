"""The order of training sequences: a pure function of the seed, the same on every machine and for every world size.

Sequences are counted over the whole training run: number g belongs to epoch g // n and position g % n. A pseudo-random
permutation with the key (seed, epoch) maps the position to one of the n sequences. So every epoch has every sequence
once, and a batch may extend into the next epoch. A checkpoint needs only the number of sequences taken so far, and the
run can resume from there with any batch size.
The permutation is a Feistel network on the smallest power of four >= n (at least 64), applied again until the result is
below n (cycle walking; Black and Rogaway 2002). Memory and time are O(batch), and all numbers are integers.
"""

import numpy as np

ROUNDS = 8
LEAST_HALF_BITS = 3  # with 2, the orders of n = 4 are 28 standard deviations from equally likely; with 3, less than 2
MASK = 2**64 - 1


def sequence_ids(seed: int, first: int, count: int, n_sequences: int) -> np.ndarray:
    """Return the ids (count,) int64, in [0, n_sequences), of the sequences with numbers first, first + 1, ... in the run.

    Raises ValueError if an argument is out of range.
    """
    if n_sequences < 1 or count < 1 or first < 0:
        raise ValueError(
            f"out of range: first={first} must be at least 0, count={count} and n_sequences={n_sequences} at least 1"
        )
    counter = first + np.arange(count, dtype=np.int64)
    epoch, position = np.divmod(counter, n_sequences)
    return _permute(position.astype(np.uint64), _epoch_keys(seed, epoch), n_sequences).astype(np.int64)


def _permute(position: np.ndarray, keys: np.ndarray, n: int) -> np.ndarray:
    """Apply to each position (B,) uint64, below n, the permutation of its key (B,) uint64. Returns (B,), below n."""
    half_bits = max(LEAST_HALF_BITS, ((n - 1).bit_length() + 1) // 2)
    ids = _feistel(position, keys, half_bits)
    while (outside := np.flatnonzero(ids >= n)).size:
        ids[outside] = _feistel(ids[outside], keys[outside], half_bits)
    return ids


def _feistel(x: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    """Permute [0, 4**half_bits): x (B,) and keys (B,) uint64 -> (B,) uint64."""
    bits, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = x >> bits, x & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (_mix(right ^ _mix(keys + np.uint64(number))) & mask)
    return left << bits | right


def _epoch_keys(seed: int, epoch: np.ndarray) -> np.ndarray:
    """Return a 64-bit key (B,) for each (seed, epoch)."""
    return _mix(_mix(np.full(len(epoch), seed & MASK, np.uint64)) ^ epoch.astype(np.uint64))


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's step and finalizer (Steele, Lea and Flood 2014) to an array of uint64; additions wrap around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
