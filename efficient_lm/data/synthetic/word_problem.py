"""Word problems of groups; parity is one of them."""

from functools import lru_cache
from itertools import permutations
from typing import Literal

import numpy as np

from efficient_lm.data.synthetic.base import Rows, SyntheticSpec
from efficient_lm.data.synthetic.row_random import RowRandom
from efficient_lm.spec import Count

CYCLIC = tuple(f"z{order}" for order in range(2, 61))
GROUPS = (*CYCLIC, "s3", "s4", "s5", "a4", "a5")


class WordProblemSpec(SyntheticSpec):
    """A word of group elements: what is the product of all that were read so far?

    Every token is an element of a finite group, drawn independently; the answer at each place is the product of the
    elements up to it, from left to right. ``z2`` is parity: the tokens are bits, the answers whether the ones so far
    are odd in number. ``s5``, the permutations of five, and ``a5``, the even ones, are complete for NC1, and no model
    that is a constant-depth circuit solves them at every length unless TC0 = NC1; the other groups are solvable.

    Vocabulary: the elements, read and answered alike. In ``zN`` element i is i modulo N; permutations are numbered in
    lexicographic order, 0 is the identity, and ``p q`` is p followed by q: the permutation i → q[p[i]].

    Source: Merrill, Petty and Sabharwal, "The illusion of state in state-space models", 2024, section 5; parity as in
    Grazzi et al., "Unlocking state-tracking in linear RNNs through negative eigenvalues", 2024, section 5.1.

    Attributes:
        group: ``z2`` to ``z60`` (cyclic), ``s3``, ``s4``, ``s5`` (symmetric), ``a4``, ``a5`` (alternating).
        answers: ``every`` place is asked, or the ``last`` one alone.
    """

    kind: Literal["word_problem"] = "word_problem"
    length: Count = 64
    group: Literal[GROUPS] = "s5"
    answers: Literal["every", "last"] = "every"

    @property
    def vocab_size(self) -> int:
        return len(multiplication_table(self.group))

    def rows(self, random: RowRandom) -> Rows:
        table = multiplication_table(self.group)
        tokens = random.integers(len(table), self.length)
        answers = np.ones(tokens.shape, bool)
        if self.answers == "last":
            answers[:, :-1] = False
        return Rows(tokens, _prefix_products(table, tokens), answers)


@lru_cache
def multiplication_table(group: str) -> np.ndarray:
    """int64 [order, order]: the number of the product of a row's element and a column's."""
    family, size = group[0], int(group[1:])
    if family == "z":
        return np.add.outer(np.arange(size), np.arange(size)) % size
    elements = [element for element in permutations(range(size)) if family == "s" or _even(element)]
    number = {element: index for index, element in enumerate(elements)}
    return np.array([[number[tuple(second[i] for i in first)] for second in elements] for first in elements])


def _even(permutation: tuple[int, ...]) -> bool:
    pairs = ((a, b) for place, a in enumerate(permutation) for b in permutation[place + 1 :])
    return sum(a > b for a, b in pairs) % 2 == 0


def _prefix_products(table: np.ndarray, elements: np.ndarray) -> np.ndarray:
    """The product of the elements [rows, length] up to each place, by doubling (Hillis and Steele, 1986)."""
    products, reach = elements, 1
    while reach < elements.shape[1]:
        joined = table[products[:, :-reach], products[:, reach:]]
        products = np.concatenate([products[:, :reach], joined], axis=1)
        reach *= 2
    return products
