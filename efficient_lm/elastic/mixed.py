"""A part of its own for every layer in every step, in one compiled program."""

from collections.abc import Sequence
from copy import copy
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from efficient_lm.elastic.nested import Nested, nested_models
from efficient_lm.elastic.nesting import Gradient, Loss, NestingSpec, shares
from efficient_lm.elastic.switched import SwitchedStack
from efficient_lm.errors import ConfigError
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import LanguageModel, ModelSpec
from efficient_lm.spec import Listing, Positive

PURPOSE = 7
"""Of the random numbers of a layer, those that choose its part."""


class MixedSpec(NestingSpec):
    """In every step each layer draws a part of itself, so that layers learn to work with unequal ones.

    Attributes:
        probabilities: of each of the models' parts, the whole last; null: all alike.
    """

    kind: Literal["mixed"] = "mixed"
    probabilities: Annotated[Listing[Positive], Field(min_length=1)] | None = None

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        for axis in ("layers", "width"):
            if axis in spec.elastic.axes:
                raise ConfigError(
                    f"nesting: 'mixed' draws parts of each layer, and {axis} is no part of one: "
                    f"set model.elastic.{axis}=null, or take nesting=sample"
                )

    def gradient(self, model: LanguageModel, loss: Loss) -> Gradient:
        nested = nested_models(model)
        mixed = copy(model)
        mixed.stack = MixedStack(model, nested, shares("probabilities", self.probabilities, len(nested)))
        return loss.gradient(Nested({}, None, mixed, model))

    def cost(self, flops: Sequence[float]) -> float:
        return sum(map(float.__mul__, shares("probabilities", self.probabilities, len(flops)), flops))


class MixedStack(SwitchedStack):
    """The parts are drawn by random numbers of the step."""

    def __init__(self, model: LanguageModel, nested: Sequence[Nested], probabilities: Sequence[float]):
        super().__init__(model, nested)
        self.logits = jnp.log(jnp.asarray(probabilities))

    def part(self, context: Context) -> jax.Array | None:
        key = context.random(PURPOSE)
        return None if key is None else jax.random.categorical(key, self.logits)
