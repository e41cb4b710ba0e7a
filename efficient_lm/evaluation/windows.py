"""Windows of text: what the model reads at a time, and which of its tokens are scored.

A window is a run of pairs of input and target (see `efficient_lm.data.packing`). Pair i of a document predicts its
token i from what stands before it in the window; pair 0 reads the begin token.
"""

from collections.abc import Iterator
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import model_validator

from efficient_lm.data.packing import Batch, Fragment, SplitPacking, pack
from efficient_lm.data.store import TokenStore
from efficient_lm.errors import ConfigError
from efficient_lm.evaluation.buckets import Group, count_bucket, group_by_length
from efficient_lm.spec import Count, Spec

GATHERED = 4
"""The head is computed for scored tokens alone where they are at most one in so many."""


class WindowSpec(Spec):
    """How text is cut.

    Attributes:
        sequence_length: tokens that the model reads at a time.
        stride: tokens between the beginnings of windows; less than `sequence_length` makes them overlap, so that a
            window brings ``sequence_length - stride`` tokens of context and scores its new ones alone. None, or
            `sequence_length`, is disjoint.
        begin: ``document`` puts the begin token in front of each document and scores every token once, the document's
            end included. ``none`` reads the text as it is: what nothing stands before is not scored, nor an end.
        limit: at most so many windows, the first ones; None takes all.
    """

    sequence_length: Count
    stride: Count | None = None
    begin: Literal["document", "none"] = "document"
    limit: Count | None = None

    @model_validator(mode="after")
    def _fits(self) -> "WindowSpec":
        if self.stride is not None and self.stride > self.sequence_length:
            raise ConfigError(
                f"stride: {self.stride} would leave out text between windows of "
                f"sequence_length={self.sequence_length}; at most {self.sequence_length}"
            )
        if self.begin == "none" and self.sequence_length < 2:
            raise ConfigError("sequence_length: with begin=none a window of one token scores nothing; at least 2")
        return self

    @property
    def sliding(self) -> bool:
        """Whether windows overlap."""
        return self.stride is not None and self.stride < self.sequence_length

    def plan(self, store: TokenStore, documents: np.ndarray) -> "Windows":
        """The windows of some documents (int64 indices), in order."""
        if self.begin == "document" and not self.sliding:
            return StreamWindows(self, store, documents)
        return DocumentWindows(self, store, documents)

    def describe(self) -> str:
        """What is scored, in a sentence."""
        length, stride = self.sequence_length, self.stride
        if self.begin == "document" and not self.sliding:
            return (
                "Every token is scored once, the end of each document included: documents stand one after the other, "
                f"each with a begin token in front, in disjoint windows of {length} tokens, and no token sees another "
                "document or an earlier window."
            )
        if self.begin == "document":
            return (
                "Every token is scored once, the end of each document included: each document is read by itself with a "
                f"begin token in front, in windows of {length} tokens that begin {stride} apart, of which the first "
                f"{length - stride} are context only (none in a document's first window)."
            )
        if not self.sliding:
            return (
                "Each document is read by itself, without begin token or end, in disjoint windows of "
                f"{length} tokens; every token is scored once except the first of each window."
            )
        return (
            "Each document is read by itself, without begin token or end, in windows of "
            f"{length} tokens that begin {stride} apart, of which the first {length - stride} are context only; every "
            "token is scored once except the first of each document."
        )


class Windows(Protocol):
    """What a spec makes of some documents.

    Attributes:
        lengths: int64 [windows], pairs of each.
        total: windows there are without a limit.
    """

    lengths: np.ndarray
    total: int

    def fragments(self, window: int) -> list[Fragment]:
        """The parts of documents in a window."""

    def context(self, window: int) -> int:
        """Pairs at its beginning that are not scored."""


class StreamWindows:
    """Documents end to end, cut every `sequence_length` pairs."""

    def __init__(self, spec: WindowSpec, store: TokenStore, documents: np.ndarray):
        length = spec.sequence_length
        self._packing = SplitPacking(store, documents, length, None)
        pairs = int((store.lengths[documents] + 1).sum())
        self.total = self._packing.rows
        self.lengths = np.minimum(length, pairs - length * np.arange(self.total))[: spec.limit]

    def fragments(self, window: int) -> list[Fragment]:
        return self._packing.fragments(0, window)

    def context(self, window: int) -> int:
        return 0


class DocumentWindows:
    """Every document by itself."""

    def __init__(self, spec: WindowSpec, store: TokenStore, documents: np.ndarray):
        made, self.total = [], 0
        for document in documents.tolist():
            windows = list(_document_windows(document, int(store.lengths[document]), spec))
            made += windows if spec.limit is None else windows[: spec.limit - len(made)]
            self.total += len(windows)
        self._windows = np.array(made, np.int64).reshape(-1, 4)
        self.lengths = self._windows[:, 2]

    def fragments(self, window: int) -> list[Fragment]:
        return [Fragment(*self._windows[window, :3].tolist())]

    def context(self, window: int) -> int:
        return int(self._windows[window, 3])


def _document_windows(document: int, tokens: int, spec: WindowSpec) -> Iterator[tuple[int, int, int, int]]:
    """(document, first pair, pairs, pairs of context) of its windows.

    Without begin token a window of n tokens has n - 1 pairs, and the first pair of a window at token a is a + 1.
    """
    bare = spec.begin == "none"
    end, stride = tokens if bare else tokens + 1, spec.stride or spec.sequence_length
    scored = 0
    for start in range(0, end, stride):
        stop = min(start + spec.sequence_length, end)
        first = start + 1 if bare else start
        if stop > max(first, scored):
            yield document, first, stop - first, max(scored - first, 0)
        scored = stop
        if stop == end:
            return


def window_batches(windows: Windows, store: TokenStore, tokens: int, most_rows: int, longest: int) -> Iterator[Batch]:
    """Windows of similar length in batches, as `pack` and `make_scorer` describe them.

    Args:
        windows: from `WindowSpec.plan`.
        tokens, most_rows: a batch has at most so many tokens, unless it is one window, and windows.
        longest: length that no row exceeds.
    """
    for group in group_by_length(windows.lengths, tokens, most_rows, longest):
        yield _batch(windows, store, group)


def _batch(windows: Windows, store: TokenStore, group: Group) -> Batch:
    rows: list[Any] = [windows.fragments(int(window)) for window in group.members]
    batch = pack(store, rows + [[]] * (group.rows - len(rows)), group.time)
    for row, window in enumerate(group.members):
        batch["weights"][row, : windows.context(int(window))] = 0
    scored = np.flatnonzero(batch["weights"])
    size = count_bucket(len(scored), batch["weights"].size)
    return _gathered(batch, scored, size) if size * GATHERED <= batch["weights"].size else batch


def _gathered(batch: Batch, scored: np.ndarray, size: int) -> Batch:
    """The batch with the targets of the scored places alone, filled up to `size`."""

    def take(values: np.ndarray) -> np.ndarray:
        return np.pad(values.reshape(-1)[scored], (0, size - len(scored)))

    chosen = {name: take(batch[name]) for name in ("targets", "weights", "target_bytes")}
    places = {"chosen": np.pad(scored, (0, size - len(scored))).astype(np.int32)}
    return batch | chosen | places | {"target_positions": take(batch["positions"])}
