"""A token leaves once a layer hardly changes its residual stream any more."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from efficient_lm.models.context import Context
from efficient_lm.models.parameters import Parameters
from efficient_lm.models.skipping.base import SkippingSpec, cosine, count_fault, live
from efficient_lm.models.traversal import Passage, Runs, Traversal
from efficient_lm.spec import Natural, Real

if TYPE_CHECKING:
    from efficient_lm.models.language_model import LanguageModel


class SaturationSpec(SkippingSpec):
    """The streams in front of a layer and behind it are alike (MuE, Tang et al. 2023; Schuster et al. 2022).

    The head reads the stream that the token left with through the final norm.

    Attributes:
        threshold: of their cosine, above which they are alike.
        first: layers that every token runs, and that are not looked at.
    """

    kind: Literal["saturation"] = "saturation"
    threshold: Annotated[Real, Field(ge=-1, le=1)] = 0.98
    first: Natural = 1

    def faults(self, model: "LanguageModel") -> Iterator[tuple[str, str]]:
        depth = len(model.layers)
        yield from count_fault("first", self.first, 0, depth - 1, f"the model has {depth} layers")

    def traversal(self, model: "LanguageModel", params: Parameters) -> Traversal:
        return _Saturation(self, len(model.layers))


class _Saturation(Traversal):
    def __init__(self, spec: SaturationSpec, depth: int):
        self.spec, self.tables = spec, np.arange(depth) >= spec.first

    def start(self, x: jax.Array) -> jax.Array:
        """Which tokens have left: bool ``[batch, time]``."""
        return jnp.zeros(x.shape[:2], bool)

    def choose(self, state: jax.Array, table: jax.Array, context: Context) -> Runs:
        going = live(context) & ~state
        return Runs(going, going)

    def watch(
        self, state: jax.Array, table: jax.Array, passage: Passage, runs: Runs | None, context: Context
    ) -> jax.Array:
        alike = cosine(passage.before, passage.after) > self.spec.threshold
        return state | (table & runs.mixer & alike)
