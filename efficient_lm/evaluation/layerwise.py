"""Rows sent through the layers one after the other, with a look inside each on the way."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.models.block import Block, BlockSpec
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.layered import layer_parameters
from efficient_lm.models.parameters import Blueprint, Parameters

Figures = dict[str, jax.Array]
"""Name → values."""

Look = Callable[[Block, BlockSpec, jax.Array, Context], tuple[jax.Array, Figures]]
"""``look(block, spec, x, context)``: the residual stream behind a block, and what was seen in it."""


class Layerwise:
    """Looks into one model; compiled programs are kept between calls, one for each kind of block.

    Args:
        look: what is done in each layer.
        dtype: of the computation.
        record: whether routers say what became of each token.
    """

    def __init__(
        self, model: LanguageModel, look: Look, dtype: jax.typing.DTypeLike = jnp.float32, record: bool = False
    ):
        self.model, self._look, self._record = model, look, record
        self._enter = jax.jit(lambda params, tokens, context: model.entered(params, tokens, context, dtype=dtype)[:2])
        self._layers: dict[int, Callable] = {}
        """By the identity of a kind of block, which the model keeps alive."""

    def __call__(self, params: Parameters, tokens: jax.Array, context: Context | None = None) -> list[Figures]:
        """What was seen in each layer.

        Args:
            params: of the model.
            tokens: int32 ``[batch, time]``; a few rows are enough.
            context: positions and documents; None takes each row as one whole document.
        """
        context = replace(context or Context.rows(*tokens.shape), record=self._record)
        outer = {name: values for name, values in params.items() if name != "stack"}
        x, context = self._enter(outer, jnp.asarray(tokens, jnp.int32), context)
        stack, found, shared = self.model.stack, [], {}
        layers = zip(stack.places, layer_parameters(self.model, params), strict=True)
        for number, ((segment, place, _), values) in enumerate(layers):
            inputs = None if context.layer_inputs is None else context.layer_inputs[number]
            here = stack.told(context, number, jnp.asarray(stack.numbers[number], jnp.int32), inputs, shared)
            part = int(segment.removeprefix("segment_")), int(place.removeprefix("layer_"))
            x, figures, handed = self._layer(number, stack.periods[part[0]][part[1]])(values, x, here)
            if here.hands_on:
                shared[stack.sharing.hands_on[number]] = handed
            found.append(figures)
        return found

    def batch(self, params: Parameters, batch: Mapping[str, np.ndarray]) -> list[Figures]:
        """The same of a batch of the loader (see `efficient_lm.data.packing.pack`)."""
        context = Context(jnp.asarray(batch["positions"]), jnp.asarray(batch["segment_ids"]))
        return self(params, jnp.asarray(batch["tokens"]), context)

    def _layer(self, number: int, blueprint: Blueprint) -> Callable:
        if id(blueprint) not in self._layers:
            run = partial(_seen, self._look, self.model.layers[number], blueprint)
            self._layers[id(blueprint)] = jax.jit(run)
        return self._layers[id(blueprint)]


def _seen(
    look: Look, spec: BlockSpec, blueprint: Blueprint, values: Parameters, x: jax.Array, context: Context
) -> tuple[jax.Array, Figures, dict[str, jax.Array]]:
    block = blueprint(values)
    # Of this second run, all but what is handed on is dead code.
    handed = block(x, context)[2].shared if context.hands_on else {}
    return *look(block, spec, x, context), handed
