"""Every token is scored as often as promised, after as much context as promised, in few shapes."""

import numpy as np
import pytest

from efficient_lm.data.store import TokenStore
from efficient_lm.errors import ConfigError
from efficient_lm.evaluation.buckets import count_bucket, group_by_length, length_bucket
from efficient_lm.evaluation.windows import WindowSpec, window_batches

BEGIN, END = 4001, 4002
LENGTHS = [1, 2, 3, 7, 8, 9, 16, 23, 40]


def store(lengths=LENGTHS, byte_lengths=True):
    """Token k of document d is ``1 + k``; each has two bytes."""
    tokens = np.concatenate([1 + np.arange(length) for length in lengths]).astype(np.uint16)
    table = np.full(4003, 2, np.int32)
    table[[BEGIN, END]] = 0
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenStore(tokens, offsets, 2 * np.array(lengths), END, BEGIN, table if byte_lengths else None)


def scored(spec, texts, **options):
    """(document, target, tokens read in its window) of every scored place, from the plan."""
    windows = spec.plan(texts, np.arange(len(texts)))
    found = []
    for window in range(len(windows.lengths)):
        fragments, context = windows.fragments(window), windows.context(window)
        assert sum(fragment.length for fragment in fragments) == windows.lengths[window] <= spec.sequence_length
        for document, start, length in fragments:
            found += [(document, start + i, i + 1) for i in range(context, length)]
    return found


@pytest.mark.parametrize("stride", [None, 8, 3, 1])
def test_each_token_and_end_once_with_a_begin_token(stride):
    places = scored(WindowSpec(sequence_length=8, stride=stride), store())
    assert sorted(place[:2] for place in places) == [(d, t) for d, n in enumerate(LENGTHS) for t in range(n + 1)]
    if stride in (3, 1):
        assert all(read > 8 - stride or read == target + 1 for _, target, read in places)
        assert max(read for _, _, read in places) == 8


@pytest.mark.parametrize("stride", [None, 8])
def test_bare_windows_leave_out_their_first_token(stride):
    places = scored(WindowSpec(sequence_length=8, stride=stride, begin="none"), store())
    assert sorted(place[:2] for place in places) == [(d, t) for d, n in enumerate(LENGTHS) for t in range(n) if t % 8]
    assert all(read == target % 8 for _, target, read in places)


@pytest.mark.parametrize("stride", [7, 3, 1])
def test_bare_sliding_windows_leave_out_the_first_token_of_a_document(stride):
    places = scored(WindowSpec(sequence_length=8, stride=stride, begin="none"), store())
    assert sorted(place[:2] for place in places) == [(d, t) for d, n in enumerate(LENGTHS) for t in range(1, n)]
    # The context of a window, of which its first token may have no place of its own.
    assert all(read >= 8 - stride or read == target for _, target, read in places)


def test_a_limit_takes_the_first_windows():
    for options in ({}, {"stride": 3}, {"begin": "none"}, {"begin": "none", "stride": 3}):
        whole = scored(WindowSpec(sequence_length=8, **options), store())
        spec = WindowSpec(sequence_length=8, limit=4, **options)
        windows = spec.plan(store(), np.arange(len(LENGTHS)))
        assert len(windows.lengths) == 4 < windows.total
        part = scored(spec, store())
        assert part == whole[: len(part)]


def test_faults_name_the_bound():
    with pytest.raises(ConfigError, match="stride: 9 would leave out text .*at most 8"):
        WindowSpec(sequence_length=8, stride=9)
    with pytest.raises(ConfigError, match="sequence_length: with begin=none .*at least 2"):
        WindowSpec(sequence_length=1, begin="none")


def test_the_sentence_names_what_is_left_out():
    assert "end of each document included" in WindowSpec(sequence_length=8).describe()
    assert "begin 3 apart, of which the first 5 are context" in WindowSpec(sequence_length=8, stride=3).describe()
    assert "except the first of each window" in WindowSpec(sequence_length=8, begin="none").describe()
    assert "except the first of each document" in WindowSpec(sequence_length=8, stride=3, begin="none").describe()


@pytest.mark.parametrize("byte_lengths", [True, False])
@pytest.mark.parametrize("options", [{}, {"stride": 3}, {"begin": "none"}, {"begin": "none", "stride": 3}])
def test_batches_hold_the_plan(options, byte_lengths):
    spec, texts = WindowSpec(sequence_length=8, **options), store(byte_lengths=byte_lengths)
    windows = spec.plan(texts, np.arange(len(texts)))
    targets, size = [], 0.0
    for batch in window_batches(windows, texts, 32, 32, 8):
        assert batch["tokens"].shape in {(4, 8), (2, 8), (1, 8)}
        weights = batch["weights"].reshape(-1) > 0
        targets += batch["targets"].reshape(-1)[weights].tolist()
        size += (batch["target_bytes"] * batch["weights"]).sum()
    expected = [END if t == LENGTHS[d] else t + 1 for d, t, _ in scored(spec, texts)]
    assert sorted(targets) == sorted(expected) and size == 2 * sum(target != END for target in expected)


def test_only_scored_places_reach_the_head_where_they_are_few():
    spec, texts = WindowSpec(sequence_length=256, stride=4, begin="none"), store([2000])
    windows = spec.plan(texts, np.arange(1))
    full, *rest = window_batches(windows, texts, 2048, 2048, 256)
    assert all(batch["chosen"].shape == (64,) == batch["targets"].shape for batch in rest) and rest
    total = sum(int((batch["weights"] > 0).sum()) for batch in [full, *rest])
    assert total == 1999
    for batch in rest:
        real = batch["weights"] > 0
        places = batch["chosen"][real]
        # Token k is 1 + k, so that a target is one more than what is read in its place.
        np.testing.assert_array_equal(batch["tokens"].reshape(-1)[places] + 1, batch["targets"][real])
        np.testing.assert_array_equal(batch["positions"].reshape(-1)[places], batch["target_positions"][real])


def test_buckets():
    assert [length_bucket(n, 2048) for n in (1, 64, 65, 97, 129, 193, 1023, 1025, 1600)] == [
        64, 64, 96, 128, 192, 256, 1024, 1536, 2048,
    ]  # fmt: skip
    assert length_bucket(5, 8) == 8 and length_bucket(999, 1000) == 1000
    assert [count_bucket(n, 10_000) for n in (1, 65, 257, 5000)] == [64, 256, 1024, 10_000]


def test_groups_cover_all_in_few_shapes():
    lengths = np.random.default_rng(0).integers(1, 1024, 5000)
    groups = group_by_length(lengths, 4096, 64, 1024)
    assert sorted(np.concatenate([group.members for group in groups])) == list(range(5000))
    for group in groups:
        assert group.time >= lengths[group.members].max() and len(group.members) <= group.rows
        assert group.rows * group.time <= 4096 and group.rows <= 64
    assert len({(group.rows, group.time) for group in groups}) <= 10
