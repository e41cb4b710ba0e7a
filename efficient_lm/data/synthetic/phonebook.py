"""Phonebook look-up."""

from typing import Literal

import numpy as np
from pydantic import model_validator

from efficient_lm.data.synthetic.base import Rows, SyntheticSpec, at_least, at_most
from efficient_lm.data.synthetic.row_random import RowRandom
from efficient_lm.errors import ConfigError
from efficient_lm.spec import Count

DIGITS = 10
COLON, NEWLINE, QUESTION, FIRST_LETTER = range(DIGITS, DIGITS + 4)


class PhonebookSpec(SyntheticSpec):
    """A list of names and numbers, then one of the names: what is its number?

    Entries ``name : number newline`` with distinct names and independent numbers, then ``? name :`` for an entry drawn
    at random, and its number, digit by digit: the answer at the last colon is the first digit, and each digit is read
    before the next one is due. What is left of the row is padding.

    Vocabulary: 0 to 9 are digits, 10 the colon, 11 the newline, 12 the question mark, and letters from 13 on.

    Source: Jelassi et al., "Repeat after me: Transformers are better than state space models at copying", 2024, section
    4.2, as used in Waleffe et al., "An empirical study of Mamba-based language models", 2024, section 2.3 (there in the
    words of a language model's tokenizer, with worked examples before the question).

    Attributes:
        entries: names in the book; None takes as many as the row holds.
        name_length, number_length: tokens of each.
        letters: that names are made of.
    """

    kind: Literal["phonebook"] = "phonebook"
    length: Count = 256
    entries: Count | None = None
    name_length: Count = 2
    number_length: Count = 4
    letters: Count = 26

    @model_validator(mode="after")
    def _fits(self) -> "PhonebookSpec":
        entry, question = self._sizes
        at_least("length", self.length, entry + question, "an entry and the question take as much")
        fitting = (self.length - question) // entry
        if self.entries is not None:
            at_most("entries", self.entries, fitting, f"each takes {entry} of data.length={self.length}")
        names = self.letters**self.name_length
        if names < (self.entries or fitting):
            raise ConfigError(
                f"data.name_length: {self.name_length} of {self.letters} letters make {names} names for "
                f"{self.entries or fitting} entries; raise data.name_length or data.letters, or set data.entries"
            )
        return self

    @property
    def vocab_size(self) -> int:
        return FIRST_LETTER + self.letters

    @property
    def _sizes(self) -> tuple[int, int]:
        """Tokens of an entry and of the question with what is read of its answer."""
        both = self.name_length + self.number_length
        return both + 2, both + 1

    def rows(self, random: RowRandom) -> Rows:
        entry, question = self._sizes
        count = self.entries or (self.length - question) // entry
        drawn = random.distinct(self.letters**self.name_length, count)
        powers = self.letters ** np.arange(self.name_length)
        names = FIRST_LETTER + drawn[:, :, None] // powers % self.letters
        numbers = random.integers(DIGITS, count * self.number_length).reshape(*drawn.shape, -1)
        colons = np.full((*drawn.shape, 1), COLON)
        book = np.concatenate([names, colons, numbers, np.full_like(colons, NEWLINE)], axis=2)
        asked = random.integers(count, 1)[:, :, None]
        name, number = (np.take_along_axis(values, asked, axis=1)[:, 0] for values in (names, numbers))
        mark, colon = np.full((random.rows, 1), QUESTION), np.full((random.rows, 1), COLON)
        tokens = np.concatenate([book.reshape(random.rows, -1), mark, name, colon, number], axis=1)
        answers = np.zeros((random.rows, tokens.shape[1] - 1), bool)
        answers[:, -self.number_length :] = True
        return Rows(tokens[:, :-1], tokens[:, 1:], answers)
