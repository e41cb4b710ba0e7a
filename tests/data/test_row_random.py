"""Random numbers of rows: the published generator, and draws that depend on their row alone."""

import numpy as np
import pytest

from efficient_lm.data.synthetic.row_random import RowRandom, first_places, philox


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_the_generator(counter, key, words):
    found = philox(tuple(np.array([word], np.uint64) for word in counter), key)
    assert tuple(int(word[0]) for word in found) == words


def draws(rows, seed=0, stream=0):
    random = RowRandom(seed, stream, np.asarray(rows))
    return [
        random.uniform(5),
        random.integers(7, 3),
        random.distinct(40, 9),
        random.distinct(9, 9),
        random.weighted(1 / np.arange(1.0, 12), 4),
        random.uniform(2),
    ]


def test_a_row_is_the_same_in_any_company():
    far = 1 << 40
    together = draws([3, 0, far, 5])
    for index, row in enumerate([3, 0, far, 5]):
        for whole, alone in zip(together, draws([row]), strict=True):
            assert np.array_equal(whole[index], alone[0])


def test_rows_streams_seeds_and_draws_differ():
    found = [draws([0])[0], draws([1])[0], draws([1 << 32])[0], draws([0], seed=1)[0], draws([0], stream=1)[0]]
    found += [draws([0])[5]]
    values = np.concatenate([array.ravel() for array in found])
    assert len(np.unique(values)) == len(values)


def test_draws_are_distributed_as_they_say():
    random = RowRandom(0, 0, np.arange(20_000))
    uniform = random.uniform(3)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert np.allclose(uniform.mean(0), 0.5, atol=0.01) and np.allclose(np.corrcoef(uniform.T), np.eye(3), atol=0.03)
    assert np.allclose(np.bincount(random.integers(5, 1)[:, 0]) / 20_000, 0.2, atol=0.015)
    for bound, count in ((6, 6), (30, 3)):
        chosen = random.distinct(bound, count)
        assert (np.diff(np.sort(chosen, axis=1), axis=1) > 0).all() and chosen.max() < bound
        for place in range(count):
            assert np.allclose(np.bincount(chosen[:, place], minlength=bound) * bound / 20_000, 1, atol=0.15)


def test_weighted_draws_follow_their_weights_one_after_the_other():
    weights = np.array([5.0, 3.0, 2.0])
    chosen = RowRandom(1, 0, np.arange(40_000)).weighted(weights, 2)
    pairs = np.zeros((3, 3))
    np.add.at(pairs, (chosen[:, 0], chosen[:, 1]), 1 / 40_000)
    first = weights / weights.sum()
    expected = first[:, None] * first / (1 - first)[:, None]
    np.fill_diagonal(expected, 0)
    assert np.allclose(pairs, expected, atol=0.01)


def test_first_places():
    assert first_places(np.array([[4, 2, 4, 4, 2, 9]])).tolist() == [[0, 1, 0, 0, 1, 5]]
