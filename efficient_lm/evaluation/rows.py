"""A few rows of text or data to look at a model with."""

from collections.abc import Iterator, Sequence

import numpy as np

from efficient_lm.data.packing import Batch, pack
from efficient_lm.data.sources import FilesSource
from efficient_lm.data.store import open_store
from efficient_lm.data.tokenizers import Tokenizer
from efficient_lm.errors import DataError
from efficient_lm.evaluation.windows import WindowSpec

TOKENS = 2048
"""Tokens that are looked at together; what is seen inside layers takes room."""


def text_rows(paths: Sequence[str], tokenizer: Tokenizer, length: int, rows: int) -> Batch:
    """The first rows of text files (see `pack`), documents one after the other; padding where there is less text.

    Raises:
        DataError: a file that cannot be read, or no text.
    """
    store = open_store(FilesSource(paths=tuple(paths), any_extension=True), tokenizer)
    windows = WindowSpec(sequence_length=length, limit=rows).plan(store, np.arange(len(store)))
    found = [windows.fragments(index) for index in range(len(windows.lengths))]
    if not found:
        raise DataError(f"{', '.join(paths)}: there is no text")
    return pack(store, found + [[]] * (rows - len(found)), length)


def pieces(batch: Batch) -> Iterator[Batch]:
    """A batch in equal parts of about `TOKENS` tokens, the last filled up with padding."""
    rows, length = batch["tokens"].shape
    size = min(rows, max(1, TOKENS // length))
    for start in range(0, rows, size):
        part = {name: values[start : start + size] for name, values in batch.items()}
        missing = size - len(part["tokens"])
        yield {
            name: np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)) for name, values in part.items()
        }  # fmt: skip
