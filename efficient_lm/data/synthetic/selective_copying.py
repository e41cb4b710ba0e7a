"""Selective copying."""

from typing import Literal

import numpy as np
from pydantic import model_validator

from efficient_lm.data.synthetic.base import Rows, SyntheticSpec, at_least, at_most, places
from efficient_lm.data.synthetic.row_random import RowRandom
from efficient_lm.spec import Count


class SelectiveCopyingSpec(SyntheticSpec):
    """Content tokens at random places among noise, then to be said in order.

    The first ``length - items`` tokens are noise, except at `items` distinct places drawn at random, which hold content
    tokens, each drawn independently. The last `items` tokens are markers; the answer at the i-th marker is the i-th
    content token. What a layer with fixed dynamics cannot do is to keep the content and let the noise pass.

    Vocabulary: 0 is noise; 1 to ``vocabulary - 2`` are content; ``vocabulary - 1`` is the marker.

    Source: Gu and Dao, "Mamba: Linear-time sequence modeling with selective state spaces", 2023, section 4.1.1 and
    appendix E.1 (there 16 content tokens, vocabulary 16, 4096 tokens before the markers), after the variable copying
    task of Jing et al., 2019.

    Attributes:
        items: content tokens.
        vocabulary: entries in all.
    """

    kind: Literal["selective_copying"] = "selective_copying"
    length: Count = 256
    items: Count = 16
    vocabulary: Count = 16

    @model_validator(mode="after")
    def _fits(self) -> "SelectiveCopyingSpec":
        at_least("length", self.length, 2, "an item and its marker take two tokens")
        at_most("items", self.items, self.length // 2, f"an item and its marker take two of data.length={self.length}")
        at_least("vocabulary", self.vocabulary, 3, "it has noise, content and a marker")
        return self

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def rows(self, random: RowRandom) -> Rows:
        before = self.length - self.items
        content = 1 + random.integers(self.vocabulary - 2, self.items)
        where = np.sort(random.distinct(before, self.items), axis=1)
        tokens = places(content, where, self.length)
        tokens[:, before:] = self.vocabulary - 1
        targets = np.zeros_like(tokens)
        targets[:, before:] = content
        return Rows(tokens, targets, targets > 0)
