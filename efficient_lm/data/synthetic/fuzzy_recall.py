"""In-context recall with keys and values of several tokens."""

from functools import lru_cache
from itertools import permutations
from typing import Literal

import numpy as np
from pydantic import model_validator

from efficient_lm.data.synthetic.base import Rows, SyntheticSpec, at_least
from efficient_lm.data.synthetic.row_random import RowRandom, first_places
from efficient_lm.errors import ConfigError
from efficient_lm.spec import Count

MOST_MOTIFS = 1 << 20


class FuzzyRecallSpec(SyntheticSpec):
    """A stream of keys, each followed by its value, both of several tokens: what was this key's value?

    Keys have 1 to `key_size` distinct tokens of the key half of the vocabulary, values 1 to `value_size` of the other
    half; sizes are equally likely, and so are the motifs of a size. Pairs follow each other while one and the final one
    fit for certain. A key's value is drawn when it first comes, and the same each time it comes again; the final pair
    is one of those before, drawn at random. The value of a key that came before is asked for, token by token: its first
    token at the key's last one, and each token is read before the next one is due. What is left is padding.

    Vocabulary: the first half are key tokens, the second half value tokens.

    Source: Poli et al., "Mechanistic design and scaling of hybrid architectures", 2024, section 3 (there vocabulary 16,
    length 128, up to three tokens each; tested with keys of three tokens alone).

    Attributes:
        vocabulary: entries in all.
        key_size, value_size: tokens of the longest key and value.
    """

    kind: Literal["fuzzy_recall"] = "fuzzy_recall"
    length: Count = 128
    vocabulary: Count = 16
    key_size: Count = 3
    value_size: Count = 3

    @model_validator(mode="after")
    def _fits(self) -> "FuzzyRecallSpec":
        longest = self.key_size + self.value_size
        at_least("length", self.length, 2 * longest, "two of the longest pairs take as much")
        most = max(self.key_size, self.value_size)
        at_least("vocabulary", self.vocabulary, 2 * most, f"half of it makes motifs of up to {most} distinct tokens")
        if (self.vocabulary // 2) ** most > MOST_MOTIFS:
            raise ConfigError(
                f"data.vocabulary: {self.vocabulary} entries make too many motifs of {most} tokens; "
                "lower it, data.key_size or data.value_size"
            )
        return self

    @property
    def vocab_size(self) -> int:
        return self.vocabulary // 2 * 2

    def rows(self, random: RowRandom) -> Rows:
        half, longest = self.vocabulary // 2, self.key_size + self.value_size
        slots = (self.length - longest) // 2 + 1
        keys = _motifs(half, self.key_size).draw(random, slots)
        values = _motifs(half, self.value_size).draw(random, slots)
        key_sizes, sizes = _motifs(half, self.key_size).sizes, _motifs(half, self.value_size).sizes
        values = np.take_along_axis(values, first_places(keys), axis=1)
        ends = np.cumsum(key_sizes[keys] + sizes[values], axis=1)
        # A pair is there if it began where the longest one and the final one would still have fitted.
        begins = np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
        there = begins + 2 * longest <= self.length
        count = there.sum(axis=1)[:, None]
        probe = (random.uniform(1) * count).astype(np.int64)
        for drawn in (keys, values):
            last = np.take_along_axis(drawn, probe, axis=1)
            np.put_along_axis(drawn, np.minimum(count, slots - 1), last, axis=1)
        return self._laid_out(keys, values, begins, np.arange(slots) <= count)

    def _laid_out(self, keys: np.ndarray, values: np.ndarray, begins: np.ndarray, there: np.ndarray) -> Rows:
        """Rows of the pairs [rows, slots] that are `there`, each from its place in `begins` on."""
        half, slots = self.vocabulary // 2, keys.shape[1]
        of_keys, of_values = _motifs(half, self.key_size), _motifs(half, self.value_size)
        asked = first_places(np.where(there, keys, -1 - np.arange(slots))) < np.arange(slots)
        # One place more, behind the row, takes what is not there.
        tokens = np.zeros((len(keys), self.length + 1), np.int64)
        answers = np.zeros(tokens.shape, bool)
        values_begin = begins + of_keys.sizes[keys]
        for motifs, drawn, start, shift, asks in (
            (of_keys, keys, begins, 0, False),
            (of_values, values, values_begin, half, True),
        ):
            for index in range(motifs.tokens.shape[1]):
                inside = there & (index < motifs.sizes[drawn])
                at = np.where(inside, start + index, self.length)
                np.put_along_axis(tokens, at, shift + motifs.tokens[drawn, index], axis=1)
                if asks:
                    # The place before a token is where it is due.
                    np.put_along_axis(answers, np.where(inside & asked, at - 1, self.length), True, axis=1)
        used = np.where(there, values_begin + of_values.sizes[values], 0).max(axis=1)
        targets = np.roll(tokens, -1, axis=1)
        return Rows(tokens[:, :-1], targets[:, :-1], answers[:, :-1], used)


class Motifs:
    """All ordered choices of 1 to `longest` distinct ones of `tokens` tokens.

    Attributes:
        tokens: int64 [motifs, longest], 0 behind the end.
        sizes: int64 [motifs].
    """

    def __init__(self, tokens: int, longest: int):
        found = [[*permutations(range(tokens), size)] for size in range(1, longest + 1)]
        self._counts = np.array([len(motifs) for motifs in found])
        self._starts = np.cumsum(self._counts) - self._counts
        self.sizes = np.repeat(np.arange(1, longest + 1), self._counts)
        self.tokens = np.array([motif + (0,) * (longest - len(motif)) for motifs in found for motif in motifs])

    def draw(self, random: RowRandom, count: int) -> np.ndarray:
        """int64 [rows, count]: numbers of motifs; sizes are equally likely, and so are the motifs of a size."""
        size = random.integers(len(self._counts), count)
        return self._starts[size] + (random.uniform(count) * self._counts[size]).astype(np.int64)


_motifs = lru_cache(maxsize=8)(Motifs)
