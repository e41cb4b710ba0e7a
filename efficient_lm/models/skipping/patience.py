"""A token leaves once several exits in a row have said the same."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.models.parameters import Parameters
from efficient_lm.models.skipping.base import count_fault
from efficient_lm.models.skipping.early_exit import EarlyExit, HeadExitSpec
from efficient_lm.models.traversal import Traversal
from efficient_lm.spec import Count

if TYPE_CHECKING:
    from efficient_lm.models.language_model import LanguageModel

Seen = tuple[jax.Array, jax.Array]
"""The likeliest token at the last exit, and how often it has been confirmed: int32 ``[batch, time]`` each."""


class PatienceSpec(HeadExitSpec):
    """The likeliest token is that of the exit before, for the n-th time in a row (PABEE, Zhou et al. 2020).

    Attributes:
        exits_alike: n; the exit that said it first does not count.
    """

    kind: Literal["patience"] = "patience"
    exits_alike: Count = 2

    def faults(self, model: "LanguageModel") -> Iterator[tuple[str, str]]:
        faults = list(super().faults(model))
        yield from faults
        if not faults:
            exits, numbers = self.exits(model)
            count = int(np.sum(numbers < len(exits.places)))
            if count < 2:
                yield "layers", "one exit has none before it to agree with; name two, or take skipping=confidence"
            else:
                said = f"of {count} exits the first has none before it"
                yield from count_fault("exits_alike", self.exits_alike, 1, count - 1, said)

    def traversal(self, model: "LanguageModel", params: Parameters) -> Traversal:
        return _Patience(self, model, params)


class _Patience(EarlyExit):
    def first(self, batch: int, time: int) -> Seen:
        return jnp.full((batch, time), -1, jnp.int32), jnp.zeros((batch, time), jnp.int32)

    def leaves(self, seen: Seen, hidden: jax.Array, number: jax.Array) -> tuple[jax.Array, Seen]:
        before, count = seen
        likeliest = self.of_logits(jnp.argmax, hidden).astype(jnp.int32)
        count = jnp.where(likeliest == before, count + 1, 0)
        return count >= self.spec.exits_alike, (likeliest, count)
