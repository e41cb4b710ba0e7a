"""The contract of a synthetic task: rows of token ids with answers, a pure function of (seed, row)."""

from abc import abstractmethod
from functools import lru_cache
from typing import ClassVar, NamedTuple

import numpy as np

from efficient_lm.data.base import ENDLESS, BatchIterator, Data, DataSpec, iterate, share, shares
from efficient_lm.data.batch_sizes import BatchSizes
from efficient_lm.data.packing import Batch
from efficient_lm.data.synthetic.row_random import RowRandom
from efficient_lm.data.tokenizers import AbsentTokenizer, Tokenizer
from efficient_lm.errors import ConfigError
from efficient_lm.spec import Count, Natural

TRAINING, VALIDATION, FIXED = range(3)
"""Streams of random numbers: of training rows, of validation rows, and of what all rows have in common."""


class Rows(NamedTuple):
    """Rows of a task.

    Attributes:
        tokens: int [rows, length], what the model reads.
        targets: int, in the shape of `tokens`: what it should say at each place; read where it answers.
        answers: bool, in the same shape: where it is asked.
        used: int [rows], places before the padding; None for all.
    """

    tokens: np.ndarray
    targets: np.ndarray
    answers: np.ndarray
    used: np.ndarray | None = None


class SyntheticSpec(DataSpec):
    """A task that makes its own rows, one document each, and asks for answers at some of their places.

    Attributes:
        length: tokens of a row.
        examples: rows there are to train on, in a new order each epoch; None makes fresh ones for ever.
        validation_examples: rows for validation, from a stream of their own.
        threads: that prepare batches ahead.
    """

    reads_text: ClassVar[bool] = False

    length: Count
    examples: Count | None = None
    validation_examples: Count = 1024
    threads: Natural = 1

    @property
    def row_length(self) -> int:
        return self.length

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Token ids are below it."""

    @abstractmethod
    def rows(self, random: RowRandom) -> Rows:
        """``random.rows`` rows of at most `length` tokens, from its draws alone."""

    def open(self, tokenizer: Tokenizer, sequence_length: int, seed: int) -> "SyntheticData":
        if not isinstance(tokenizer, AbsentTokenizer):
            raise ConfigError(
                f"tokenizer: data of the kind '{self.kind}' is made of token ids and no text; "
                "leave the tokenizer out, or choose tokenizer=none"
            )
        return SyntheticData(self.changed({"length": sequence_length}), seed)


class SyntheticData(Data):
    """Rows of a task, made when they are asked for."""

    figures = ("loss", "accuracy", "sequence_accuracy")
    has_validation = True

    def __init__(self, spec: SyntheticSpec, seed: int):
        self._spec, self._seed = spec, seed
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def train_batches(
        self, batch_size: int | BatchSizes, start_step: int = 0, process_index: int = 0, process_count: int = 1
    ) -> BatchIterator:
        sizes = BatchSizes.of(batch_size)
        parts = shares(sizes, process_index, process_count)

        def batch(step: int) -> Batch:
            part = parts[sizes.rows(step)]
            return self._batch(TRAINING, self._examples(sizes.first(step) + np.arange(part.start, part.stop)))

        iterator = iterate(batch, ENDLESS, self._spec.threads)
        iterator.set_state({"next_index": start_step})
        return iterator

    def validation_batches(
        self, batch_size: int, limit_rows: int | None = None, process_index: int = 0, process_count: int = 1
    ) -> BatchIterator:
        part = share(batch_size, process_index, process_count)
        count = min(limit_rows or self._spec.validation_examples, self._spec.validation_examples)

        def batch(step: int) -> Batch:
            numbers = step * batch_size + np.arange(part.start, part.stop)
            made = self._batch(VALIDATION, numbers)
            return made | {
                name: made[name] * (numbers < count)[:, None].astype(made[name].dtype)
                for name in ("segment_ids", "weights")
            }

        return iterate(batch, -(-count // batch_size), self._spec.threads)

    def summary(self) -> dict[str, int | None]:
        """Rows of both parts; None for training rows without end."""
        return {"train_examples": self._spec.examples, "validation_examples": self._spec.validation_examples}

    def _examples(self, numbers: np.ndarray) -> np.ndarray:
        """The rows at some places of the endless sequence."""
        count = self._spec.examples
        if count is None:
            return numbers
        return np.array([self._order(number // count)[number % count] for number in numbers.tolist()], np.int64)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self._spec.examples)

    def _batch(self, stream: int, numbers: np.ndarray) -> Batch:
        rows = self._spec.rows(RowRandom(self._seed, stream, numbers))
        return arrays(rows, self._spec.length)


def arrays(rows: Rows, length: int) -> Batch:
    """The batch of some rows, as `efficient_lm.data.packing.pack` describes it; answers alone have a weight."""
    shape = (len(rows.tokens), length)
    used = np.full(shape[0], rows.tokens.shape[1]) if rows.used is None else rows.used
    inside = np.arange(length) < used[:, None]
    answers = _filled(rows.answers, length) & inside
    return {
        "tokens": np.where(inside, _filled(rows.tokens, length), 0).astype(np.int32),
        "targets": np.where(answers, _filled(rows.targets, length), 0).astype(np.int32),
        "segment_ids": inside.astype(np.int32),
        "positions": np.where(inside, np.arange(length), 0).astype(np.int32),
        "weights": answers.astype(np.float32),
        "target_bytes": np.zeros(shape, np.float32),
    }


def _filled(values: np.ndarray, length: int) -> np.ndarray:
    return np.pad(values, ((0, 0), (0, length - values.shape[1])))


def places(values: np.ndarray, at: np.ndarray, length: int) -> np.ndarray:
    """int64 [rows, length]: `values` [rows, count] at the places `at` of the same shape, and 0 elsewhere."""
    row = np.zeros((len(values), length), np.int64)
    np.put_along_axis(row, at, values, axis=1)
    return row


def at_least(key: str, given: int, least: int, why: str) -> None:
    """Refuse an option that is too small. Raises `ConfigError`."""
    if given < least:
        raise ConfigError(f"data.{key}: {given} is too small: {why}; at least {least}")


def at_most(key: str, given: int, most: int, why: str) -> None:
    """Refuse an option that is too large. Raises `ConfigError`."""
    if given > most:
        raise ConfigError(f"data.{key}: {given} is too many: {why}; at most {most}")
