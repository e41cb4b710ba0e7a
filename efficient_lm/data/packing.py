"""Packing: which part of which document stands where in rows of equal length, and the arrays of a batch of rows.

A document of n tokens is the stream ``[begin] t1 .. tn [end]``, hence n + 1 pairs of input and target: inputs
``[begin, t1 .. tn]``, targets ``[t1 .. tn, end]``; begin and end are one token for most tokenizers. A packing lays out
every pair of every document once per epoch.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from efficient_lm.data.store import TokenStore

Batch = dict[str, np.ndarray]


class Fragment(NamedTuple):
    """Pairs `start` to ``start + length`` of one document; one segment of a row."""

    document: int
    start: int
    length: int


class Packing(Protocol):
    """Rows of an epoch.

    Attributes:
        rows: how many an epoch has.
    """

    rows: int

    def fragments(self, epoch: int, row: int) -> list[Fragment]:
        """The fragments of a row, together no longer than the sequence length."""


class SplitPacking:
    """Documents end to end, cut in rows. Only the last row of an epoch has padding.

    With a seed, documents and rows are shuffled anew in each epoch; with None they keep their order.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray, sequence_length: int, seed: int | None):
        self._documents, self._length, self._seed = documents, sequence_length, seed
        self._pairs = store.lengths[documents] + 1
        self._total = int(self._pairs.sum())
        self.rows = -(-self._total // sequence_length)
        self._epoch = lru_cache(maxsize=2)(self._lay_out)

    def fragments(self, epoch: int, row: int) -> list[Fragment]:
        return list(self._fragments(epoch, row))

    def _fragments(self, epoch: int, row: int) -> Iterator[Fragment]:
        order, ends, rows = self._epoch(epoch if self._seed is not None else 0)
        position = int(row if rows is None else rows[row]) * self._length
        stop = min(position + self._length, self._total)
        place = int(np.searchsorted(ends, position, side="right"))
        while position < stop:
            end, index = int(ends[place]), order[place]
            start = position - (end - int(self._pairs[index]))
            length = min(end, stop) - position
            yield Fragment(int(self._documents[index]), start, length)
            position += length
            place += 1

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Order of the documents, where each ends in the stream, and order of the rows."""
        if self._seed is None:
            return np.arange(len(self._pairs)), np.cumsum(self._pairs), None
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._pairs))
        return order, np.cumsum(self._pairs[order]), random.permutation(self.rows)


class FirstFitPacking:
    """Documents whole where they fit a row, longer ones cut in chunks of a row; chunks share rows by first fit.

    The plan is made once (first-fit decreasing; the seed decides among equal lengths). With a seed, rows are shuffled
    anew in each epoch.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray, sequence_length: int, seed: int | None):
        self._seed = seed
        chunks = _chunks(documents, store.lengths[documents] + 1, sequence_length)
        if seed is not None:
            chunks = chunks[np.random.default_rng([seed, 0, 1]).permutation(len(chunks))]
        bins = first_fit_decreasing(chunks[:, 2], sequence_length)
        self._chunks = chunks[np.argsort(bins, kind="stable")]
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(bins))])
        self.rows = len(self._starts) - 1
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def fragments(self, epoch: int, row: int) -> list[Fragment]:
        if self._seed is not None:
            row = self._order(epoch)[row]
        chunks = self._chunks[self._starts[row] : self._starts[row + 1]]
        return [Fragment(*chunk) for chunk in chunks.tolist()]

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self.rows)


PACKINGS = {"split": SplitPacking, "first_fit": FirstFitPacking}


def first_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item when items, largest first, go in the first bin with room (Johnson, 1973).

    All items of one size are placed together: a bin with room r takes ``r // size`` of them before the next bin gets
    any, which is what placing them one by one does.

    Args:
        sizes: int64 [items], from 1 to `capacity`; equal sizes are placed in their order here.
        capacity: room of an empty bin.

    Returns:
        int64 [items], bins numbered from 0.
    """
    order = np.argsort(-sizes, kind="stable")
    distinct, first = np.unique(-sizes[order], return_index=True)
    limits = [*first.tolist(), len(sizes)]
    chosen = np.empty(len(sizes), np.int64)
    names, room, used = np.empty(0, np.int64), np.empty(0, np.int64), 0
    for size, begin, end in zip((-distinct).tolist(), limits, limits[1:], strict=False):
        items = order[begin:end]
        taken = np.cumsum(room // size)
        fitting = min(len(items), int(taken[-1])) if len(taken) else 0
        place = np.searchsorted(taken, np.arange(fitting), side="right")
        chosen[items[:fitting]] = names[place]
        room = room - size * np.bincount(place, minlength=len(room))
        opened = used + np.arange(len(items) - fitting) // (capacity // size)
        chosen[items[fitting:]] = opened
        new, counts = np.unique(opened, return_counts=True)
        used += len(new)
        names, room = np.concatenate([names, new]), np.concatenate([room, capacity - size * counts])
        open_bins = room > 0
        names, room = names[open_bins], room[open_bins]
    return chosen


def pack(store: TokenStore, rows: Sequence[Sequence[Fragment]], sequence_length: int) -> Batch:
    """The arrays of a batch of rows, each [rows, sequence_length].

    Returns:
        `tokens` and `targets`, int32, end of text on padding; `segment_ids`, int32, 1, 2, ... within a row and 0 on
        padding; `positions`, int32, from 0 in each segment; `weights`, float32, 0 on padding; `target_bytes`, float32,
        UTF-8 bytes of each target token, 0 for end of text. The bytes of a document add up to its length in UTF-8: they
        are the tokens' own where these do, and otherwise the document's, spread evenly.
    """
    shape = (len(rows), sequence_length)
    batch = {name: np.full(shape, store.end_of_text, np.int32) for name in ("tokens", "targets")}
    batch |= {name: np.zeros(shape, np.int32) for name in ("segment_ids", "positions")}
    batch |= {name: np.zeros(shape, np.float32) for name in ("weights", "target_bytes")}
    for index, fragments in enumerate(rows):
        row, column = {name: array[index] for name, array in batch.items()}, 0
        for segment, fragment in enumerate(fragments, start=1):
            part = slice(column, column + fragment.length)
            _fill(store, fragment, {name: array[part] for name, array in row.items()})
            row["segment_ids"][part] = segment
            column += fragment.length
    if store.byte_lengths is not None:
        batch["target_bytes"][:] = store.byte_lengths[batch["targets"]]
    return batch


def _fill(store: TokenStore, fragment: Fragment, part: Batch) -> None:
    begin, end = store.offsets[fragment.document : fragment.document + 2].tolist()
    first = begin + fragment.start
    inputs = store.tokens[max(first - 1, begin) : first - 1 + fragment.length]
    targets = store.tokens[first : min(first + fragment.length, end)]
    part["tokens"][fragment.length - len(inputs) :] = inputs
    if fragment.start == 0:
        part["tokens"][0] = store.begin_of_text
    part["targets"][: len(targets)] = targets
    part["positions"][:] = np.arange(fragment.length)
    part["weights"][:] = 1
    if store.byte_lengths is None:
        edges = np.arange(fragment.start, fragment.start + len(targets) + 1)
        spread = edges * store.document_bytes[fragment.document] // (end - begin)
        part["target_bytes"][: len(targets)] = np.diff(spread)


def _chunks(documents: np.ndarray, pairs: np.ndarray, length: int) -> np.ndarray:
    """Every document in pieces of at most `length` pairs: int64 [chunks, 3] of document, start, length."""
    counts = -(-pairs // length)
    owner = np.repeat(np.arange(len(pairs)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * length
    return np.stack([documents[owner], start, np.minimum(pairs[owner] - start, length)], axis=1)
