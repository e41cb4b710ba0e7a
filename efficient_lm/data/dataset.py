"""The loader: batches of packed rows whose order is a pure function of (seed, step).

Row ``step * batch_size + b`` of the endless sequence of epochs is row b of the batch of that step, whatever the number
of processes and threads. Grain maps, prefetches and keeps the position; it is imported only when batches are asked for,
because that takes seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from efficient_lm.data.packing import PACKINGS, Batch, Packing, SplitPacking, pack
from efficient_lm.data.sources import SourceSpec
from efficient_lm.data.store import TokenStore, open_store
from efficient_lm.data.tokenizers import Tokenizer
from efficient_lm.errors import ConfigError, DataError
from efficient_lm.spec import Count, Natural, OneOf, Spec

ENDLESS = 1 << 60


class BatchIterator(Protocol):
    """An iterator over batches whose position can be kept."""

    def __iter__(self) -> "BatchIterator": ...

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]:
        """The position, as a small JSON-able dict: what comes next is what was not yet returned."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a position."""

    def close(self) -> None:
        """Stop the threads that prepare batches ahead."""


@dataclass(frozen=True)
class Part:
    """The documents of a store that are for training, or for validation: int64 [documents]."""

    store: TokenStore
    documents: np.ndarray

    def summary(self) -> dict[str, int]:
        """Documents, tokens (without end of text) and UTF-8 bytes."""
        tokens, size = self.store.lengths[self.documents], self.store.document_bytes[self.documents]
        return {"documents": len(self.documents), "tokens": int(tokens.sum()), "bytes": int(size.sum())}


class DataSpec(Spec):
    """What is trained and validated on, and how documents become rows.

    Without a `validation` source, the last of every `holdout_every` documents of `source` is held out.
    """

    source: OneOf[SourceSpec]
    validation: OneOf[SourceSpec] | None = None
    holdout_every: Count | None = 20
    packing: Literal["split", "first_fit"] = "split"
    shuffle: bool = True
    threads: Natural = 1

    def open(self, tokenizer: Tokenizer, sequence_length: int, seed: int) -> "Data":
        """Read and encode everything, or take it from the cache. Raises `DataError`."""
        if self.validation is not None:
            _refuse_overlap(self.source, self.validation)
        store = open_store(self.source, tokenizer)
        documents = np.arange(len(store))
        if self.validation is not None:
            held_out = open_store(self.validation, tokenizer)
            train, validation = Part(store, documents), Part(held_out, np.arange(len(held_out)))
        else:
            every = self.holdout_every or len(store) + 1
            chosen = documents % every == every - 1
            train, validation = Part(store, documents[~chosen]), Part(store, documents[chosen])
        if not len(train.documents):
            held = f" besides the {len(store)} held out by holdout_every" if len(store) else ""
            raise DataError(f"the {self.source.kind} source has no document to train on{held}")
        return Data(self, train, validation, sequence_length, seed)


class Data:
    """Opened data: batches for training, batches for validation."""

    def __init__(self, spec: DataSpec, train: Part, validation: Part, sequence_length: int, seed: int):
        self._spec, self._train, self._validation = spec, train, validation
        self._length = sequence_length
        order = seed if spec.shuffle else None
        self._packing: Packing = PACKINGS[spec.packing](train.store, train.documents, sequence_length, order)

    @property
    def validation(self) -> Part:
        """The documents that are held out. Raises `DataError` if there is none."""
        if not len(self._validation.documents):
            raise DataError(
                f"no validation documents: the {self._spec.source.kind} source has {len(self._train.documents)}; "
                "set data.validation, or data.holdout_every to no more than that"
            )
        return self._validation

    @property
    def rows_per_epoch(self) -> int:
        return self._packing.rows

    def train_batches(
        self, batch_size: int, start_step: int = 0, process_index: int = 0, process_count: int = 1
    ) -> BatchIterator:
        """Endless batches of packed rows, from `start_step` on (see `pack` for the arrays).

        Args:
            batch_size: rows of the whole batch; this process gets its contiguous ``batch_size / process_count``.
            start_step: step of the first batch.
            process_index: which part of each batch.
            process_count: how many parts.

        Raises:
            ConfigError: processes that do not divide the batch.
        """
        share = _share(batch_size, process_index, process_count)

        def batch(step: int) -> Batch:
            places = (divmod(step * batch_size + index, self._packing.rows) for index in share)
            rows = [self._packing.fragments(epoch, row) for epoch, row in places]
            return pack(self._train.store, rows, self._length)

        iterator = _iterate(batch, ENDLESS, self._spec.threads)
        iterator.set_state({"next_index": start_step})
        return iterator

    def validation_batches(
        self, batch_size: int, limit_rows: int | None = None, process_index: int = 0, process_count: int = 1
    ) -> BatchIterator:
        """One pass over the validation documents in order, packed by `split`; the last batch is filled up with padding.

        Args:
            batch_size: rows of the whole batch, of which this process gets its part.
            limit_rows: at most so many rows, spread evenly over the documents.
            process_index: which part of each batch.
            process_count: how many parts.

        Raises:
            DataError: there is no validation document.
            ConfigError: processes that do not divide the batch.
        """
        return _ordered(
            self.validation,
            self._length,
            batch_size,
            _share(batch_size, process_index, process_count),
            limit_rows,
            self._spec.threads,
        )

    def summary(self) -> dict[str, int]:
        """Documents, tokens and bytes of both parts (`train_documents`, ...), and `rows_per_epoch`."""
        parts = {"train": self._train.summary(), "validation": self._validation.summary()}
        figures = {f"{part}_{name}": value for part, values in parts.items() for name, value in values.items()}
        return figures | {"rows_per_epoch": self.rows_per_epoch}


def _ordered(
    part: Part, sequence_length: int, batch_size: int, share: range, limit_rows: int | None, threads: int
) -> BatchIterator:
    packing = SplitPacking(part.store, part.documents, sequence_length, None)
    count = packing.rows if limit_rows is None else min(limit_rows, packing.rows)
    chosen = np.arange(count) * packing.rows // max(count, 1)

    def batch(step: int) -> Batch:
        numbers = [step * batch_size + index for index in share]
        rows = [packing.fragments(0, int(chosen[n])) if n < count else [] for n in numbers]
        return pack(part.store, rows, sequence_length)

    return _iterate(batch, -(-count // batch_size), threads)


def _iterate(batch: Callable[[int], Batch], steps: int, threads: int) -> Any:
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(grain.MapDataset.range(steps).map(batch).to_iter_dataset(options))


def _share(batch_size: int, process_index: int, process_count: int) -> range:
    if batch_size % process_count:
        raise ConfigError(f"a batch of {batch_size} rows cannot be divided among {process_count} processes")
    rows = batch_size // process_count
    return range(process_index * rows, (process_index + 1) * rows)


def _refuse_overlap(train: SourceSpec, validation: SourceSpec) -> None:
    first, second = train.identity(), validation.identity()
    if first == second:
        raise DataError(f"data.validation is the same {train.kind} source as data.source")
    common = [file[0] for file in first.get("files", []) if file in second.get("files", [])]
    if common:
        raise DataError(f"'{common[0]}' is both in data.source and in data.validation")
