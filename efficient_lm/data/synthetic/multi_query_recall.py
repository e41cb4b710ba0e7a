"""Multi-query associative recall."""

from typing import Literal

import numpy as np
from pydantic import model_validator

from efficient_lm.data.synthetic.base import Rows, SyntheticSpec, at_least, at_most, places
from efficient_lm.data.synthetic.row_random import RowRandom
from efficient_lm.spec import Count, Positive


class MultiQueryRecallSpec(SyntheticSpec):
    """Pairs of key and value, then every key once more: what was its value?

    A row begins with ``k1 v1 .. kP vP``, keys and values each distinct and drawn at random. Of the tokens after them
    every second one may be a query: key i stands at slot g_i, distinct slots drawn in turn with probability
    proportional to ``(slot + 1) ** (power - 1)``, so that most queries come early and some late. The answer to a query
    is due at its own place. Other tokens there are drawn from the whole vocabulary, or 0.

    Vocabulary: 0 fills; 1 to ``vocabulary // 2 - 1`` are keys; the rest are values.

    Source: Arora et al., "Zoology: Measuring and improving recall in efficient language models", 2023, section 3 and
    appendix E (there vocabulary 8192, length 64 to 512, 4 to 64 pairs, power 0.01).

    Attributes:
        pairs: P.
        vocabulary: entries in all.
        power: exponent of the law of gaps; 1 makes all slots equally likely.
        random_filler: whether places that hold no query have random tokens; False fills them with 0.
    """

    kind: Literal["multi_query_recall"] = "multi_query_recall"
    length: Count = 64
    pairs: Count = 8
    vocabulary: Count = 256
    power: Positive = 0.01
    random_filler: bool = True

    @model_validator(mode="after")
    def _fits(self) -> "MultiQueryRecallSpec":
        at_least("length", self.length, 4, "a pair and its query take four tokens")
        at_most("pairs", self.pairs, self.length // 4, f"a pair and its query take four of data.length={self.length}")
        why = f"half of it less one are keys, for data.pairs={self.pairs}"
        at_least("vocabulary", self.vocabulary, 2 * self.pairs + 2, why)
        return self

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def rows(self, random: RowRandom) -> Rows:
        half, context = self.vocabulary // 2, 2 * self.pairs
        keys = 1 + random.distinct(half - 1, self.pairs)
        values = half + random.distinct(self.vocabulary - half, self.pairs)
        slots = 1 + np.arange((self.length - context) // 2)
        queries = context + 2 * random.weighted(slots ** (self.power - 1), self.pairs)
        tokens = places(keys, queries, self.length)
        targets = places(values, queries, self.length)
        tokens[:, :context:2], tokens[:, 1:context:2] = keys, values
        if self.random_filler:
            tokens = np.where(tokens == 0, random.integers(self.vocabulary, self.length), tokens)
        return Rows(tokens, targets, targets > 0)
