"""Memorisation of a fixed map."""

from typing import Literal

import numpy as np
from pydantic import model_validator

from efficient_lm.data.synthetic.base import FIXED, Rows, SyntheticSpec, at_least
from efficient_lm.data.synthetic.row_random import RowRandom
from efficient_lm.spec import Count


class MemorizationSpec(SyntheticSpec):
    """Keys, whose values are the same in every row and stand in none: the map is learnt in the weights.

    A row alternates a key, drawn from all keys, and the blank token; the answer at the blank is the key's value. The
    map is one to one, drawn once from the seed, and the same for training and validation.

    Vocabulary: keys, then as many values, then the blank token.

    Source: Poli et al., "Mechanistic design and scaling of hybrid architectures", 2024, section 3 (there vocabulary 256
    to 8192, length 32).

    Attributes:
        vocabulary: entries in all.
    """

    kind: Literal["memorization"] = "memorization"
    length: Count = 32
    vocabulary: Count = 256

    @model_validator(mode="after")
    def _fits(self) -> "MemorizationSpec":
        at_least("length", self.length, 2, "a key and its answer take two places")
        at_least("vocabulary", self.vocabulary, 5, "it has two keys, their values and the blank")
        return self

    @property
    def vocab_size(self) -> int:
        return 2 * self.pairs + 1

    @property
    def pairs(self) -> int:
        """Keys there are, each with a value of its own."""
        return (self.vocabulary - 1) // 2

    def values(self, seed: int) -> np.ndarray:
        """The value of each key: int64 [keys]."""
        return self.pairs + RowRandom(seed, FIXED, np.zeros(1)).distinct(self.pairs, self.pairs)[0]

    def rows(self, random: RowRandom) -> Rows:
        keys = random.integers(self.pairs, self.length // 2)
        tokens = np.stack([keys, np.full_like(keys, self.vocab_size - 1)], axis=2).reshape(random.rows, -1)
        targets = np.repeat(self.values(random.seed)[keys], 2, axis=1)
        return Rows(tokens, targets, tokens == self.vocab_size - 1)
