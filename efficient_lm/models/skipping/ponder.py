"""A token leaves once it probably would have: the deterministic exit of pondering models."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from efficient_lm.models.parameters import Parameters
from efficient_lm.models.skipping.base import missing
from efficient_lm.models.skipping.early_exit import EarlyExit, EarlyExitSpec
from efficient_lm.models.traversal import Traversal
from efficient_lm.spec import Fraction

if TYPE_CHECKING:
    from efficient_lm.models.language_model import LanguageModel


class PonderSpec(EarlyExitSpec):
    """Q-exit (PALBERT, Balagansky and Gavrilov 2022, section 3.2): the probability to have left by now reaches q.

    Attributes:
        q: from 0 to 1.
    """

    kind: Literal["ponder"] = "ponder"
    q: Fraction = 0.5

    def faults(self, model: "LanguageModel") -> Iterator[tuple[str, str]]:
        if model.exits is None or not model.exits.ponders:
            what = "probabilities to leave (train with model.exits.loss.kind=ponder)"
            yield "kind", missing(what, self.kind, list(self.kinds))
        else:
            yield from super().faults(model)

    def criterion_flops(self, model: "LanguageModel") -> float:
        return 2.0 * model.spec.width

    def traversal(self, model: "LanguageModel", params: Parameters) -> Traversal:
        return _Ponder(self, model, params)


class _Ponder(EarlyExit):
    def first(self, batch: int, time: int) -> jax.Array:
        """The probability not to have left."""
        return jnp.ones((batch, time), jnp.float32)

    def leaves(self, seen: jax.Array, hidden: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        stayed = seen * jax.nn.sigmoid(-self.exits.halting(self.params, number, hidden))
        return 1 - stayed >= self.spec.q, stayed
