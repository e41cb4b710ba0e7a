"""The contract of training data: what a run is told of it, and batches whose order is a pure function of (seed, step).

A batch has the rows of an endless sequence that follow those of the steps before it, whatever the number of processes
and threads (see `efficient_lm.data.batch_sizes`). Grain maps, prefetches and keeps the position; it is imported only
when batches are asked for, because that takes seconds.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import BeforeValidator

from efficient_lm.data.batch_sizes import BatchSizes
from efficient_lm.data.packing import Batch
from efficient_lm.data.tokenizers import Tokenizer
from efficient_lm.errors import ConfigError
from efficient_lm.spec import Choice, OneOf, merged
from efficient_lm.validation import validate

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


class Data(ABC):
    """Opened data: batches for training, batches for validation.

    Attributes:
        figures: what validation reports, by the names that `efficient_lm.evaluation.bits_per_byte.evaluate` gives.
    """

    figures: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def has_validation(self) -> bool:
        """Whether anything is held out."""

    @abstractmethod
    def train_batches(
        self, batch_size: int | BatchSizes, start_step: int = 0, process_index: int = 0, process_count: int = 1
    ) -> BatchIterator:
        """Endless batches of rows (see `efficient_lm.data.packing.pack` for the arrays), from `start_step` on.

        Args:
            batch_size: rows of the whole batch, the same in every step or not; this process gets its contiguous
                ``batch_size / process_count``.
            start_step: step of the first batch.
            process_index: which part of each batch.
            process_count: how many parts.

        Raises:
            ConfigError: processes that do not divide a batch.
        """

    @abstractmethod
    def validation_batches(
        self, batch_size: int, limit_rows: int | None = None, process_index: int = 0, process_count: int = 1
    ) -> BatchIterator:
        """One pass over what is held out, always the same; the last batch is filled up with padding.

        Args:
            batch_size: rows of the whole batch, of which this process gets its part.
            limit_rows: at most so many rows.
            process_index: which part of each batch.
            process_count: how many parts.

        Raises:
            DataError: nothing is held out.
            ConfigError: processes that do not divide the batch.
        """

    @abstractmethod
    def summary(self) -> dict[str, int | None]:
        """How much there is."""


class DataSpec(Choice, role="data"):
    """What is trained and validated on.

    Attributes:
        reads_text: whether a tokenizer makes its tokens of text; otherwise the data is made of token ids.
    """

    reads_text: ClassVar[bool] = True

    @property
    def row_length(self) -> int | None:
        """Tokens of every row where the data itself says so; None leaves it to `train.sequence_length`."""
        return None

    @property
    def vocab_size(self) -> int | None:
        """Token ids are below it where the data itself says so; None leaves it to the tokenizer."""
        return None

    def changed(self, changes: Mapping[str, Any]) -> "DataSpec":
        """This data with some of its values set anew, key by key. Raises `ConfigError`."""
        return validate(type(self), merged(self.dump(), changes), "data")

    @abstractmethod
    def open(self, tokenizer: Tokenizer, sequence_length: int, seed: int) -> Data:
        """Everything that is needed to make batches of rows of `sequence_length` tokens.

        Raises:
            ConfigError: a tokenizer or a length that does not fit.
            DataError: something that cannot be read.
        """


def _text_by_default(value: Any) -> Any:
    return {"kind": "text", **value} if isinstance(value, Mapping) and "kind" not in value else value


AnyData = Annotated[OneOf[DataSpec], BeforeValidator(_text_by_default)]
"""Data of any kind; a mapping that names none is of the kind ``text``."""


def iterate(batch: Callable[[int], Batch], steps: int, threads: int) -> Any:
    """The batches of steps 0 to `steps`, prepared ahead by `threads`."""
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(grain.MapDataset.range(steps).map(batch).to_iter_dataset(options))


def shares(sizes: BatchSizes, process_index: int, process_count: int) -> dict[int, range]:
    """`share` of a batch of each size."""
    return {size: share(size, process_index, process_count) for size in sizes.distinct}


def share(batch_size: int, process_index: int, process_count: int) -> range:
    """The rows of a batch that a process makes. Raises `ConfigError` where processes do not divide the batch."""
    if batch_size % process_count:
        raise ConfigError(f"a batch of {batch_size} rows cannot be divided among {process_count} processes")
    rows = batch_size // process_count
    return range(process_index * rows, (process_index + 1) * rows)
