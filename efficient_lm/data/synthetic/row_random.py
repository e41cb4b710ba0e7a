"""Random numbers of many rows at once, each row's a pure function of (seed, stream, row).

Philox-4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011) turns a counter into
random words, and the row's number is part of the counter: a row is the same in whatever batch it stands, and a batch
costs a few vector operations.
"""

import numpy as np

MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
INCREMENTS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
WORD = 0xFFFFFFFF
LOW, HALF = np.uint64(WORD), np.uint64(32)


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Four random words of each counter of four.

    Args:
        counter: four uint64 arrays of 32-bit words whose shapes broadcast together.
        key: two 32-bit words.

    Returns:
        Four uint64 arrays of 32-bit words.
    """
    first, second, third, fourth = counter
    for number in range(ROUNDS):
        keys = [np.uint64((word + number * step) & WORD) for word, step in zip(key, INCREMENTS, strict=True)]
        left, right = first * MULTIPLIERS[0], third * MULTIPLIERS[1]
        first, second = (right >> HALF) ^ second ^ keys[0], right & LOW
        third, fourth = (left >> HALF) ^ fourth ^ keys[1], left & LOW
    return first, second, third, fourth


class RowRandom:
    """Draws for some rows of a stream. The same draws in the same order give a row the same numbers in any company.

    Args:
        seed: of everything.
        stream: streams of one seed are independent of each other.
        rows: int64 [rows], below 2 ** 60.
    """

    def __init__(self, seed: int, stream: int, rows: np.ndarray):
        rows = np.asarray(rows, np.uint64)[:, None]
        self.seed, self.rows = seed, len(rows)
        self._key = tuple(int(word) for word in np.random.SeedSequence([seed, stream]).generate_state(2))
        self._low, self._high = rows & LOW, rows >> HALF
        self._draws = 0

    def uniform(self, count: int) -> np.ndarray:
        """Float64 [rows, count] in [0, 1), with 53 random bits."""
        self._draws += 1
        return self._uniform(count, 0)

    def integers(self, bound: int, count: int) -> np.ndarray:
        """int64 [rows, count] from 0 to ``bound - 1``, equally likely."""
        return _scaled(self.uniform(count), bound)

    def distinct(self, bound: int, count: int) -> np.ndarray:
        """int64 [rows, count], the first of a random order of 0 to ``bound - 1``."""
        if bound <= 4 * count:
            return np.argsort(self.uniform(bound), axis=1, kind="stable")[:, :count]
        drawn = self.integers(bound, count)
        attempt = 0
        # What equals an earlier number of its row is drawn again: as if numbers came one by one, each until it is new.
        while (again := repeated(drawn)).any():
            attempt += 1
            drawn = np.where(again, _scaled(self._uniform(count, attempt), bound), drawn)
        return drawn

    def weighted(self, weights: np.ndarray, count: int) -> np.ndarray:
        """int64 [rows, count], distinct places of `weights` [places], drawn one by one in proportion to their weights.

        The first arrivals of independent exponential clocks with these rates.
        """
        arrivals = -np.log1p(-self.uniform(len(weights))) / weights
        return np.argsort(arrivals, axis=1, kind="stable")[:, :count]

    def _uniform(self, count: int, attempt: int) -> np.ndarray:
        blocks = np.arange(-(-count // 2), dtype=np.uint64)[None, :]
        draw = np.uint64(self._draws + (attempt << 16))
        words = philox((blocks, np.full_like(blocks, draw), self._low, self._high), self._key)
        pairs = np.stack([_fraction(*words[:2]), _fraction(*words[2:])], axis=-1)
        return pairs.reshape(self.rows, -1)[:, :count]


def repeated(values: np.ndarray) -> np.ndarray:
    """Whether each of `values` [rows, count] equals an earlier one of its row."""
    return first_places(values) < np.arange(values.shape[1])


def first_places(values: np.ndarray) -> np.ndarray:
    """Where each of `values` [rows, count] stands first in its row: int64 [rows, count]."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    new = np.ones(values.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # In a run of equal values the stable order begins with the earliest place.
    starts = np.maximum.accumulate(np.where(new, np.arange(values.shape[1]), 0), axis=1)
    first = np.empty_like(order)
    np.put_along_axis(first, order, np.take_along_axis(order, starts, axis=1), axis=1)
    return first


def _scaled(uniform: np.ndarray, bound: int) -> np.ndarray:
    return (uniform * bound).astype(np.int64)


def _fraction(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return ((high >> np.uint64(5)) * np.float64(1 << 26) + (low >> np.uint64(6))) / np.float64(1 << 53)
