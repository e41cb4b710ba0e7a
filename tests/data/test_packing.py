"""Packing: every pair once, segments that stay within documents, exact bytes, first fit as by hand."""

import numpy as np
import pytest

from efficient_lm.data.packing import PACKINGS, FirstFitPacking, SplitPacking, first_fit_decreasing, pack
from efficient_lm.data.store import TokenStore, encode_texts
from efficient_lm.data.tokenizers import BytesSpec, SotuBPESpec

LENGTHS = [1, 7, 8, 9, 30, 2, 2, 3, 15, 16, 64]
KINDS = sorted(PACKINGS)


def numbered(lengths=LENGTHS):
    """Documents whose tokens are all different: token i of document d is 100 d + i + 1; 0 is end of text."""
    tokens = np.concatenate([100 * d + 1 + np.arange(n) for d, n in enumerate(lengths)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenStore(tokens.astype(np.uint32), offsets, np.array(lengths) * 3 + 1, 0, 0, None)


def expected_pairs(store, documents):
    pairs = []
    for d in documents:
        stream = [0, *store.tokens[store.offsets[d] : store.offsets[d + 1]].tolist(), 0]
        pairs += zip(stream, stream[1:], strict=False)
    return sorted(pairs)


def epoch_of(packing, store, length, epoch=0):
    return pack(store, [packing.fragments(epoch, row) for row in range(packing.rows)], length)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("length", [1, 4, 8, 17, 500])
def test_every_pair_exactly_once_in_every_epoch(kind, seed, length):
    store, documents = numbered(), np.array([0, 1, 3, 4, 6, 8, 9, 10])
    packing = PACKINGS[kind](store, documents, length, seed)
    for epoch in (0, 3):
        batch = epoch_of(packing, store, length, epoch)
        real = batch["weights"] > 0
        found = sorted(zip(batch["tokens"][real].tolist(), batch["targets"][real].tolist(), strict=True))
        assert found == expected_pairs(store, documents)


@pytest.mark.parametrize("kind", KINDS)
def test_segments(kind):
    store = numbered()
    packing = PACKINGS[kind](store, np.arange(len(LENGTHS)), 10, 1)
    batch = epoch_of(packing, store, 10)
    for tokens, targets, segments, positions, weights in zip(
        *(batch[name] for name in ("tokens", "targets", "segment_ids", "positions", "weights")), strict=True
    ):
        used = int(weights.sum())
        assert set(weights[:used]) <= {1.0} and not weights[used:].any()
        assert not segments[used:].any() and not positions[used:].any()
        assert not tokens[used:].any() and not targets[used:].any()
        assert np.unique(segments[:used]).tolist() == list(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            assert positions[inside].tolist() == list(range(inside.sum()))
            assert np.array_equal(tokens[inside][1:], targets[inside][:-1])
            named = np.concatenate([tokens[inside], targets[inside]])
            assert len(set((named[named > 0] - 1) // 100)) == 1
            assert not tokens[inside][1:].tolist().count(0), "end of text only opens a segment"


def test_split_has_padding_only_at_the_very_end():
    store = numbered()
    packing = SplitPacking(store, np.arange(len(LENGTHS)), 10, None)
    batch = epoch_of(packing, store, 10)
    total = sum(LENGTHS) + len(LENGTHS)
    assert packing.rows == -(-total // 10)
    assert batch["weights"].ravel()[:total].all() and not batch["weights"].ravel()[total:].any()
    stream = np.concatenate([[0, *store.tokens[a : a + n]] for a, n in zip(store.offsets, LENGTHS, strict=False)])
    assert np.array_equal(batch["tokens"].ravel()[:total], stream)


def test_first_fit_keeps_short_documents_whole():
    store = numbered()
    packing = FirstFitPacking(store, np.arange(len(LENGTHS)), 10, 3)
    fragments = [fragment for row in range(packing.rows) for fragment in packing.fragments(0, row)]
    for document, count in enumerate(LENGTHS):
        sizes = sorted(fragment.length for fragment in fragments if fragment.document == document)
        whole, rest = divmod(count + 1, 10)
        assert sizes == [rest] * (rest > 0) + [10] * whole
    assert packing.rows <= sum(-(-(count + 1) // 10) for count in LENGTHS)


@pytest.mark.parametrize("seed", range(20))
def test_first_fit_decreasing_is_what_one_gets_by_hand(seed):
    random = np.random.default_rng(seed)
    capacity = int(random.integers(1, 40))
    sizes = random.integers(1, capacity + 1, random.integers(1, 200))
    rooms, by_hand = [], np.empty(len(sizes), np.int64)
    for item in np.argsort(-sizes, kind="stable"):
        bin_number = next((b for b, room in enumerate(rooms) if room >= sizes[item]), len(rooms))
        if bin_number == len(rooms):
            rooms.append(capacity)
        rooms[bin_number] -= sizes[item]
        by_hand[item] = bin_number
    assert np.array_equal(first_fit_decreasing(sizes, capacity), by_hand)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [BytesSpec(), SotuBPESpec(), None])
def test_bytes_of_targets_add_up_exactly(kind, spec):
    texts = ["é", "My fellow citizens, 日本 — \x00", "a" * 60, "The State of the Union " * 9]
    store = encode_texts(texts, spec.build()) if spec else numbered()
    packing = PACKINGS[kind](store, np.arange(len(store)), 16, 0)
    batch = epoch_of(packing, store, 16)
    assert batch["target_bytes"].sum(dtype=np.float64) == store.document_bytes.sum()
    assert not batch["target_bytes"][batch["targets"] == store.end_of_text].any()
    for document in range(len(store)):
        alone = PACKINGS[kind](store, np.array([document]), 16, None)
        assert epoch_of(alone, store, 16)["target_bytes"].sum() == store.document_bytes[document]


def test_spread_bytes_are_even():
    batch = epoch_of(SplitPacking(numbered(), np.array([4]), 16, None), numbered(), 16)
    spread = batch["target_bytes"][batch["targets"] > 0]
    assert len(spread) == 30 and spread.sum() == 91 and set(spread) == {3.0, 4.0}


def test_array_types():
    batch = epoch_of(SplitPacking(numbered(), np.array([0, 1]), 8, 0), numbered(), 8)
    types = {name: (array.dtype.name, array.shape) for name, array in batch.items()}
    whole = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), ("int32", (2, 8)))
    assert types == whole | dict.fromkeys(("weights", "target_bytes"), ("float32", (2, 8)))


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_differ_and_repeat(kind):
    store = numbered()
    packing = PACKINGS[kind](store, np.arange(len(LENGTHS)), 8, 5)
    epochs = [[packing.fragments(epoch, row) for row in range(packing.rows)] for epoch in (0, 1, 2, 0)]
    assert epochs[0] == epochs[3]
    assert epochs[0] != epochs[1] != epochs[2]
