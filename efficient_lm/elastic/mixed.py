"""A part of its own for every layer in every step, in one compiled program."""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from pydantic import Field

from efficient_lm.elastic.choices import choose
from efficient_lm.elastic.nested import Nested, nested_models
from efficient_lm.elastic.nesting import Gradient, Loss, NestingSpec, shares
from efficient_lm.elastic.submodels import first_values
from efficient_lm.errors import ConfigError
from efficient_lm.models.auxiliary import Auxiliary
from efficient_lm.models.block import BlockSpec
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import LanguageModel, ModelSpec
from efficient_lm.models.parameters import Blueprint, Initialization, Parameters
from efficient_lm.models.stack import Stack
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


class MixedStack(Stack):
    """The layers of a model, each with parts to choose from by random numbers of the step."""

    def __init__(self, model: LanguageModel, nested: Sequence[Nested], probabilities: Sequence[float]):
        spec = model.spec
        init = Initialization(spec.init_std, (2 * len(model.layers)) ** -0.5)
        super().__init__(model.layers, spec.width, init, spec.remat, spec.remat_names, spec.scan, spec.numbering)
        self.logits = jnp.log(jnp.asarray(probabilities))
        self.parts: dict[int, list[Blueprint]] = {}
        for part, period in zip(self.segments, self.periods, strict=True):
            for place, blueprint in enumerate(period):
                layer = part.start + place
                self.parts[id(blueprint)] = [self._part(model, layer, each.parts, init) for each in nested]

    @staticmethod
    def _part(model: LanguageModel, layer: int, parts: dict[str, float], init: Initialization) -> Blueprint:
        spec, width = model.layers[layer], model.spec.width
        units = choose(model, parts).units[layer]
        small: BlockSpec = spec.resolved(width).cut(width, units) if units else spec
        return Blueprint(lambda: small.build(width, init))

    def _block(
        self, blueprint: Blueprint, params: Parameters, x: jax.Array, context: Context, cache: Any
    ) -> tuple[jax.Array, Any, Auxiliary]:
        key = context.random(PURPOSE)
        if key is None or cache is not None:
            return super()._block(blueprint, params, x, context, cache)
        parts = self.parts[id(blueprint)]
        shapes = jax.eval_shape(lambda: blueprint(params)(x, context, None)[2])

        def branch(small: Blueprint) -> Callable[[Parameters, jax.Array], tuple[jax.Array, Auxiliary]]:
            def run(params: Parameters, x: jax.Array) -> tuple[jax.Array, Auxiliary]:
                y, _, auxiliary = small(first_values(params, small.declarations))(x, context, None)
                return y, jax.tree.map(_filled, auxiliary, shapes)

            return run

        drawn = jax.random.categorical(key, self.logits)
        # Nothing is kept for the backward pass but the input: what one part keeps, the others would keep zeros of.
        run = jax.checkpoint(
            lambda params, x: lax.switch(drawn, list(map(branch, parts)), params, x), prevent_cse=False
        )
        y, auxiliary = run(params, x)
        return y, None, auxiliary


def _filled(values: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """With zeros for what only the whole layer has."""
    return jnp.pad(values, [(0, whole - size) for size, whole in zip(values.shape, shape.shape, strict=True)])
