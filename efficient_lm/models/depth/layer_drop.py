"""Stochastic depth: in training, a row passes by a layer at random, the more often the deeper the layer."""

import math
from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from efficient_lm.models.auxiliary import Auxiliary
from efficient_lm.models.context import Context
from efficient_lm.models.depth.base import DepthSpec, Run
from efficient_lm.models.mixers.base import Cache
from efficient_lm.models.parameters import Initialization
from efficient_lm.spec import Fraction

DROPPED = 0
"""Purpose of the random numbers."""


class LayerDropSpec(DepthSpec):
    """A row of a training batch passes by layer l of L (from 0) with probability ``rate (2 ** (l / (L - 1)) - 1)``.

    So it is in LayerSkip (Elhoushi et al. 2024, section 4.1, equation 1, without its schedule over steps). What a block
    adds to the rows that run it is not scaled up, as it is not there; evaluation runs every layer. The layers are those
    of the model, whichever of them have the rule. All rows are computed: it makes a model fit to lose layers, and does
    not make training faster.

    Attributes:
        rate: of the model's last layer.
    """

    kind: Literal["layer_drop"] = "layer_drop"
    passes_by = False
    rate: Annotated[Fraction, Field(lt=1)] = 0.1

    def build(self, width: int, init: Initialization) -> nnx.Module:
        return LayerDrop(self.rate)

    def flops_per_token(self, width: int, block: Callable[[float], float], context_length: float) -> float:
        return block(context_length)


class LayerDrop(nnx.Module):
    def __init__(self, rate: float):
        self.rate = rate

    def __call__(
        self, run: Run, x: jax.Array, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None, Auxiliary]:
        """`x [batch, time, width]` → the same; the rows that pass by keep it."""
        y, cache, auxiliary = run(x, context, cache)
        key = context.random(DROPPED)
        if key is None:
            return y, cache, auxiliary
        rate = self.rate * jnp.expm1(math.log(2) * context.layer / max(context.layers - 1, 1))
        dropped = jax.random.bernoulli(key, rate, (x.shape[0], 1, 1))
        return jnp.where(dropped, x, y), cache, auxiliary

    def init_cache(
        self, empty: Callable[..., Cache | None], batch: int, length: int, dtype: jax.typing.DTypeLike
    ) -> Cache | None:
        """The block's own."""
        return empty(batch, length, dtype)
