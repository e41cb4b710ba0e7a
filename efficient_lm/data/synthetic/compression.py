"""Compression of a whole sequence into the state."""

from typing import Literal

import numpy as np
from pydantic import model_validator

from efficient_lm.data.synthetic.base import Rows, SyntheticSpec, at_least
from efficient_lm.data.synthetic.row_random import RowRandom
from efficient_lm.spec import Count


class CompressionSpec(SyntheticSpec):
    """Random tokens, all to be said again in order.

    The first half of the row are ordinary tokens, each drawn independently; the second half repeats one special token.
    The answer at its i-th occurrence is the i-th token of the row. Nothing in the sequence is redundant, so a state of
    fixed size has to hold all of it; attention can look back.

    Vocabulary: 0 to ``vocabulary - 2`` are ordinary; ``vocabulary - 1`` is the special token.

    Source: Poli et al., "Mechanistic design and scaling of hybrid architectures", 2024, section 3 (vocabulary 16, 32
    tokens). There the output at one special token goes, with each position's embedding, through an MLP of its own, as
    in an autoencoder; here the language model itself reads its state out, as training and decoding have it.

    Attributes:
        vocabulary: entries in all.
    """

    kind: Literal["compression"] = "compression"
    length: Count = 64
    vocabulary: Count = 16

    @model_validator(mode="after")
    def _fits(self) -> "CompressionSpec":
        at_least("length", self.length, 2, "a token and its answer take two places")
        at_least("vocabulary", self.vocabulary, 3, "it has the special token and at least two others")
        return self

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def rows(self, random: RowRandom) -> Rows:
        special, half = self.vocabulary - 1, self.length // 2
        content = random.integers(special, half)
        tokens = np.concatenate([content, np.full_like(content, special)], axis=1)
        return Rows(tokens, np.concatenate([content, content], axis=1), tokens == special)
