"""Induction heads."""

from typing import Literal

import numpy as np
from pydantic import model_validator

from efficient_lm.data.synthetic.base import Rows, SyntheticSpec, at_least, at_most
from efficient_lm.data.synthetic.row_random import RowRandom
from efficient_lm.spec import Count


class InductionHeadsSpec(SyntheticSpec):
    """What followed the special token the first time follows it each time.

    Ordinary tokens, each drawn independently, with the special token at random places, no two of them side by side, and
    at the end. Behind its first occurrence stands an ordinary token t; behind every other one, t again. The answer at
    each occurrence after the first is t; the last token of the row is one of them.

    Vocabulary: 0 to ``vocabulary - 2`` are ordinary; ``vocabulary - 1`` is the special token.

    Source: Gu and Dao, "Mamba: Linear-time sequence modeling with selective state spaces", 2023, section 4.1.2 and
    appendix E.1 (vocabulary 16, one answer, trained at length 256, tested from 2^6 to 2^20), after Dao et al., 2022.

    Attributes:
        vocabulary: entries in all.
        answers: occurrences of the special token after the first. One, the published task, gives one answer a row.
    """

    kind: Literal["induction_heads"] = "induction_heads"
    length: Count = 256
    vocabulary: Count = 16
    answers: Count = 1

    @model_validator(mode="after")
    def _fits(self) -> "InductionHeadsSpec":
        at_least("length", self.length, 3, "the special token, what follows it, and the special token")
        most = (self.length - 1) // 2
        at_most("answers", self.answers, most, f"each one takes two of data.length={self.length}")
        at_least("vocabulary", self.vocabulary, 3, "it has the special token and at least two others")
        return self

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def rows(self, random: RowRandom) -> Rows:
        special = self.vocabulary - 1
        tokens = random.integers(special, self.length)
        follows = random.integers(special, 1)
        # Distinct places of a shorter row, each moved on by those before it, are places with a gap between them.
        spread = np.sort(random.distinct(self.length - 1 - self.answers, self.answers), axis=1)
        occurrences = spread + np.arange(self.answers)
        np.put_along_axis(tokens, occurrences, special, axis=1)
        np.put_along_axis(tokens, occurrences + 1, np.broadcast_to(follows, occurrences.shape), axis=1)
        tokens[:, -1] = special
        answers = tokens == special
        np.put_along_axis(answers, occurrences[:, :1], False, axis=1)
        return Rows(tokens, np.broadcast_to(follows, tokens.shape), answers)
