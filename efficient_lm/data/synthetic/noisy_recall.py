"""In-context recall among noise."""

from typing import Literal

import numpy as np
from pydantic import model_validator

from efficient_lm.data.synthetic.base import Rows, SyntheticSpec, at_least
from efficient_lm.data.synthetic.row_random import RowRandom, first_places
from efficient_lm.errors import ConfigError
from efficient_lm.spec import Count, Fraction


class NoisyRecallSpec(SyntheticSpec):
    """A stream of keys, each followed by its value, interrupted by noise: what was this key's value?

    The row is a sequence of slots of two tokens. A slot is noise, two noise tokens, with probability `noise`; otherwise
    it is a key drawn from all keys, and its value. A key's value is drawn when it first comes, and the same each time
    it comes again; there it is asked for, at the key's place. One slot drawn at random is never noise, and the last one
    holds a key drawn from those that came before, so that every row has an answer. Without noise this is MAD's
    in-context recall.

    Vocabulary: keys, then as many values, then `noise_vocabulary` noise tokens.

    Source: Poli et al., "Mechanistic design and scaling of hybrid architectures", 2024, section 3 (there length 128, 16
    keys and values, 16 noise tokens, a fifth of it noise).

    Attributes:
        vocabulary: keys and values together.
        noise_vocabulary: noise tokens besides.
        noise: probability that a slot is noise.
    """

    kind: Literal["noisy_recall"] = "noisy_recall"
    length: Count = 128
    vocabulary: Count = 16
    noise_vocabulary: Count = 16
    noise: Fraction = 0.2

    @model_validator(mode="after")
    def _fits(self) -> "NoisyRecallSpec":
        at_least("length", self.length, 4, "a pair that comes twice takes four tokens")
        at_least("vocabulary", self.vocabulary, 4, "half of it are keys, and one alone asks nothing")
        if self.noise == 1:
            raise ConfigError("data.noise: 1.0 leaves no pair to recall; below 1")
        return self

    @property
    def vocab_size(self) -> int:
        return self.vocabulary // 2 * 2 + self.noise_vocabulary

    def rows(self, random: RowRandom) -> Rows:
        half, slots = self.vocabulary // 2, self.length // 2
        keys = random.integers(half, slots)
        noisy = random.uniform(slots) < self.noise
        kept = random.integers(slots - 1, 1)
        np.put_along_axis(noisy, kept, False, axis=1)
        noisy[:, -1] = False
        # Noise counts as keys of its own, different in each slot.
        named = np.where(noisy, half + np.arange(slots), keys)
        named[:, -1:] = _one_of_those_before(named[:, :-1], half, random)
        keys, first = np.minimum(named, half - 1), first_places(named)
        values = half + np.take_along_axis(random.integers(half, slots), first, axis=1)
        pairs = np.stack([keys, values], axis=2)
        noise = 2 * half + random.integers(self.noise_vocabulary, 2 * slots).reshape(pairs.shape)
        asked = first < np.arange(slots)
        tokens = np.where(noisy[:, :, None], noise, pairs)
        shape = (random.rows, 2 * slots)
        targets, answers = np.repeat(values, 2, axis=1), np.stack([asked, np.zeros_like(asked)], axis=2)
        return Rows(tokens.reshape(shape), targets, answers.reshape(shape))


def _one_of_those_before(named: np.ndarray, keys: int, random: RowRandom) -> np.ndarray:
    """Any of the distinct numbers below `keys` in each row of `named`, equally likely: int64 [rows, 1]."""
    present = np.zeros((len(named), keys), bool)
    row, slot = np.nonzero(named < keys)
    present[row, named[row, slot]] = True
    return np.argmax(np.where(present, random.uniform(keys), -1.0), axis=1)[:, None]
