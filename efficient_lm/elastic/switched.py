"""A part of its own for every layer, in one compiled program for all choices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.elastic.choices import Choice
from efficient_lm.elastic.nested import Nested
from efficient_lm.elastic.submodels import first_values
from efficient_lm.errors import ConfigError
from efficient_lm.models.auxiliary import Auxiliary
from efficient_lm.models.block import BlockSpec
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Blueprint, Initialization, Parameters
from efficient_lm.models.stack import Stack


def check_apart(model: LanguageModel, nested: Sequence[Nested]) -> None:
    """Whether a model's layers may have parts of their own. Raises `ConfigError`."""
    if model.stack.sharing and len({each.parts.get("heads") for each in nested}) > 1:
        raise ConfigError(
            "model.elastic.heads: layers take the keys and values of others, so that all keep the same part of heads; "
            "leave the axis out where layers have parts of their own"
        )


class SwitchedStack(Stack):
    """The layers of a model, of which each runs one of its parts; which one may be traced."""

    def __init__(self, model: LanguageModel, nested: Sequence[Nested]):
        spec = model.spec
        init = Initialization(spec.init_std, (2 * len(model.layers)) ** -0.5)
        super().__init__(model.layers, spec.width, init, spec.remat, spec.remat_names, spec.scan, spec.numbering)
        check_apart(model, nested)
        self.parts: dict[int, list[Blueprint]] = {}
        for part, period in zip(self.segments, self.periods, strict=True):
            for place, blueprint in enumerate(period):
                layer = part.start + place
                self.parts[id(blueprint)] = [self._part(model, layer, each.choice, init) for each in nested]

    def part(self, context: Context) -> jax.Array | None:
        """Which part of the layer that is told runs, int32; None for the whole, as it is without parts."""
        raise TypeError(f"{type(self).__name__} does not define part")

    @staticmethod
    def _part(model: LanguageModel, layer: int, choice: Choice, init: Initialization) -> Blueprint:
        spec, width, units = model.layers[layer], model.spec.width, choice.units[layer]
        small: BlockSpec = spec.resolved(width).cut(width, units) if units else spec
        return Blueprint(lambda: small.build(width, init))

    def _block(
        self, blueprint: Blueprint, params: Parameters, x: jax.Array, context: Context, cache: Any
    ) -> tuple[jax.Array, Any, Auxiliary]:
        which = None if cache is not None else self.part(context)
        if which is None:
            return super()._block(blueprint, params, x, context, cache)
        parts = self.parts[id(blueprint)]
        shapes = jax.eval_shape(lambda: blueprint(params)(x, context, None)[2])

        def branch(small: Blueprint) -> Callable[[Parameters, jax.Array], tuple[jax.Array, Auxiliary]]:
            def run(params: Parameters, x: jax.Array) -> tuple[jax.Array, Auxiliary]:
                y, _, auxiliary = small(first_values(params, small.declarations))(x, context, None)
                return y, jax.tree.map(_filled, auxiliary, shapes)

            return run

        # Nothing is kept for the backward pass but the input: what one part keeps, the others would keep zeros of.
        run = jax.checkpoint(
            lambda params, x: lax.switch(which, list(map(branch, parts)), params, x), prevent_cse=False
        )
        y, auxiliary = run(params, x)
        return y, None, auxiliary


class ChosenStack(SwitchedStack):
    """The parts are given.

    Args:
        levels: of each layer the place of its part among `nested`, int32 ``[layers]``; may be traced.
    """

    def __init__(self, model: LanguageModel, nested: Sequence[Nested], levels: jax.Array):
        super().__init__(model, nested)
        # Layers are told their number in the model that this one may have been cut from.
        self.levels = jnp.zeros(self.depth, jnp.int32).at[jnp.asarray(self.numbers)].set(levels)

    def part(self, context: Context) -> jax.Array:
        return self.levels[context.layer]


def _filled(values: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """With zeros for what only the whole layer has."""
    more = [(0, whole - size) for size, whole in zip(values.shape, shape.shape, strict=True)]
    return jnp.pad(values, more) if more else values
