"""Text as training data: documents in rows, a part of them held out."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from efficient_lm.data.base import ENDLESS, BatchIterator, Data, DataSpec, iterate, share, shares
from efficient_lm.data.batch_sizes import BatchSizes
from efficient_lm.data.packing import PACKINGS, Batch, Packing, SplitPacking, pack
from efficient_lm.data.sources import SourceSpec
from efficient_lm.data.store import TokenStore, open_store
from efficient_lm.data.tokenizers import Tokenizer
from efficient_lm.errors import DataError
from efficient_lm.spec import Count, Natural, OneOf


@dataclass(frozen=True)
class Part:
    """The documents of a store that are for training, or for validation: int64 [documents]."""

    store: TokenStore
    documents: np.ndarray

    def summary(self) -> dict[str, int]:
        """Documents, tokens (without end of text) and UTF-8 bytes."""
        tokens, size = self.store.lengths[self.documents], self.store.document_bytes[self.documents]
        return {"documents": len(self.documents), "tokens": int(tokens.sum()), "bytes": int(size.sum())}


class TextDataSpec(DataSpec):
    """Documents, and how they become rows.

    Without a `validation` source, the last of every `holdout_every` documents of `source` is held out.
    """

    kind: Literal["text"] = "text"
    source: OneOf[SourceSpec]
    validation: OneOf[SourceSpec] | None = None
    holdout_every: Count | None = 20
    packing: Literal["split", "first_fit"] = "split"
    shuffle: bool = True
    threads: Natural = 1

    def open(self, tokenizer: Tokenizer, sequence_length: int, seed: int) -> "TextData":
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
        return TextData(self, train, validation, sequence_length, seed)


class TextData(Data):
    """Documents of a store in rows."""

    figures = ("loss", "bits_per_byte")

    def __init__(self, spec: TextDataSpec, train: Part, validation: Part, sequence_length: int, seed: int):
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
    def has_validation(self) -> bool:
        return len(self._validation.documents) > 0

    @property
    def rows_per_epoch(self) -> int:
        return self._packing.rows

    def train_batches(
        self, batch_size: int | BatchSizes, start_step: int = 0, process_index: int = 0, process_count: int = 1
    ) -> BatchIterator:
        sizes = BatchSizes.of(batch_size)
        parts = shares(sizes, process_index, process_count)

        def batch(step: int) -> Batch:
            first, part = sizes.first(step), parts[sizes.rows(step)]
            places = (divmod(first + index, self._packing.rows) for index in part)
            rows = [self._packing.fragments(epoch, row) for epoch, row in places]
            return pack(self._train.store, rows, self._length)

        iterator = iterate(batch, ENDLESS, self._spec.threads)
        iterator.set_state({"next_index": start_step})
        return iterator

    def validation_batches(
        self, batch_size: int, limit_rows: int | None = None, process_index: int = 0, process_count: int = 1
    ) -> BatchIterator:
        """See `Data`: the documents in order, packed by `split`; a limit takes rows spread evenly over them."""
        return _ordered(
            self.validation,
            self._length,
            batch_size,
            share(batch_size, process_index, process_count),
            limit_rows,
            self._spec.threads,
        )

    def summary(self) -> dict[str, int]:
        """Documents, tokens and bytes of both parts (`train_documents`, ...), and `rows_per_epoch`."""
        parts = {"train": self._train.summary(), "validation": self._validation.summary()}
        figures = {f"{part}_{name}": value for part, values in parts.items() for name, value in values.items()}
        return figures | {"rows_per_epoch": self.rows_per_epoch}


def _ordered(
    part: Part, sequence_length: int, batch_size: int, rows: range, limit_rows: int | None, threads: int
) -> BatchIterator:
    packing = SplitPacking(part.store, part.documents, sequence_length, None)
    count = packing.rows if limit_rows is None else min(limit_rows, packing.rows)
    chosen = np.arange(count) * packing.rows // max(count, 1)

    def batch(step: int) -> Batch:
        numbers = [step * batch_size + index for index in rows]
        fragments = [packing.fragments(0, int(chosen[n])) if n < count else [] for n in numbers]
        return pack(part.store, fragments, sequence_length)

    return iterate(batch, -(-count // batch_size), threads)


def _refuse_overlap(train: SourceSpec, validation: SourceSpec) -> None:
    first, second = train.identity(), validation.identity()
    if first == second:
        raise DataError(f"data.validation is the same {train.kind} source as data.source")
    common = [file[0] for file in first.get("files", []) if file in second.get("files", [])]
    if common:
        raise DataError(f"'{common[0]}' is both in data.source and in data.validation")
