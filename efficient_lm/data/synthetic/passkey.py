"""Passkey retrieval."""

from typing import Literal

import numpy as np
from pydantic import model_validator

from efficient_lm.data.synthetic.base import Rows, SyntheticSpec, at_least, at_most
from efficient_lm.data.synthetic.row_random import RowRandom
from efficient_lm.spec import Count

DIGITS = 10
MARKER, QUERY, FIRST_FILLER = range(DIGITS, DIGITS + 3)


class PasskeySpec(SyntheticSpec):
    """A number hidden in a long stretch of the same sentence over and over, to be said at the end.

    The filler repeats its tokens in order. At a place drawn at random it is interrupted by the marker and `digits`
    random digits, and goes on. At the end stand the query token and the digits but the last: the answer at the query is
    the first digit, and each digit is read before the next one is due.

    Vocabulary: 0 to 9 are digits, 10 is the marker, 11 the query, and the filler's tokens follow.

    Source: Mohtashami and Jaggi, "Landmark attention: Random-access infinite context length for transformers", 2023,
    section 4.2 (there in words); trained on mixed lengths in Chen et al., "Stuffed Mamba: State collapse and state
    capacity of RNN-based long-context modeling", 2024.

    Attributes:
        digits: of the number.
        filler: distinct tokens of the sentence.
        shortest: rows have every length from here to `length` equally often, and padding behind; None for `length`.
    """

    kind: Literal["passkey"] = "passkey"
    length: Count = 256
    digits: Count = 5
    filler: Count = 20
    shortest: Count | None = None

    @model_validator(mode="after")
    def _fits(self) -> "PasskeySpec":
        least, why = 2 * self.digits + 1, f"the key and the query of data.digits={self.digits} take as much"
        at_least("length", self.length, least, why)
        if self.shortest is not None:
            at_least("shortest", self.shortest, least, why)
            at_most("shortest", self.shortest, self.length, "rows are no longer than data.length")
        return self

    @property
    def vocab_size(self) -> int:
        return FIRST_FILLER + self.filler

    def rows(self, random: RowRandom) -> Rows:
        number = random.integers(DIGITS, self.digits)
        shortest = self.shortest or self.length
        used = shortest + random.integers(self.length - shortest + 1, 1)
        key = 1 + self.digits
        begin = (random.uniform(1) * (used - 2 * self.digits)).astype(np.int64)
        query = used - self.digits
        column = np.arange(self.length + 1)
        tokens = FIRST_FILLER + np.where(column < begin, column, column - key) % self.filler
        for start, mark in ((begin, MARKER), (query, QUERY)):
            inside = np.concatenate([np.full_like(start, mark), number], axis=1)
            np.put_along_axis(tokens, start + np.arange(key), inside, axis=1)
        column = column[:-1]
        answers = (column >= query) & (column < used)
        return Rows(tokens[:, :-1], tokens[:, 1:], answers, used[:, 0])
