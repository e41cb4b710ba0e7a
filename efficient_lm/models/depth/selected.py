"""Some tokens of each row: gathered into shorter rows, and put back."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from efficient_lm.models.context import Context

NOTHING = {"routes": -1}
"""What stands in recorded arrays for a token that was not there; 0 or False where no other value is named."""


class Selected(NamedTuple):
    """The tokens of each row that run a block.

    Attributes:
        index: int32 ``[batch, places]``: where they are in their row, in order and without repetition.
        live: bool ``[batch, places]``; False for a place that holds none.
    """

    index: jax.Array
    live: jax.Array

    def take(self, values: jax.Array) -> jax.Array:
        """Of `values [batch, time, ...]` those of the selected tokens, ``[batch, places, ...]``."""
        index = self.index.reshape(*self.index.shape, *[1] * (values.ndim - 2))
        return jnp.take_along_axis(values, index, axis=1, mode="promise_in_bounds")

    def put(self, values: jax.Array, new: jax.Array) -> jax.Array:
        """`values [batch, time, ...]` with `new [batch, places, ...]` at every place; others stay as they are."""

        def row(values: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
            return values.at[index].set(new, unique_indices=True, mode="promise_in_bounds")

        return jax.vmap(row)(values, self.index, new)

    def spread(self, name: str, values: jax.Array, time: int) -> jax.Array:
        """A recorded array ``[batch, places, ...]`` over whole rows, ``[batch, time, ...]``."""
        nothing = jnp.asarray(NOTHING.get(name, 0), values.dtype)
        live = self.live.reshape(*self.live.shape, *[1] * (values.ndim - 2))
        blank = jnp.full((values.shape[0], time, *values.shape[2:]), nothing)
        return self.put(blank, jnp.where(live, values, nothing))

    def mask(self, time: int) -> jax.Array:
        """Bool ``[batch, time]``: the tokens that are selected."""
        return self.put(jnp.zeros((self.live.shape[0], time), bool), self.live)

    def context(self, context: Context, packed: bool) -> Context:
        """What the block is told of the selected tokens: their own positions and documents, in order.

        `packed` False promises that every place holds a token, of one document.
        """
        return replace(
            context,
            positions=self.take(context.positions),
            segment_ids=jnp.where(self.live, self.take(context.segment_ids), 0),
            packed=packed,
            gaps=True,
            pregated=None if context.pregated is None else self.take(context.pregated),
        )


def highest(scores: jax.Array, count: int, real: jax.Array) -> Selected:
    """The `count` tokens of each row with the highest scores; padding only where a row has too few real tokens.

    Args:
        scores: float32 ``[batch, time]``; of equal ones the first are taken.
        real: bool ``[batch, time]``.
    """
    _, index = jax.lax.top_k(jnp.where(real, scores, -jnp.inf), count)
    index = jnp.sort(index, axis=1)
    return Selected(index, jnp.take_along_axis(real, index, axis=1))


def first(wanted: jax.Array, count: int) -> Selected:
    """The first `count` wanted tokens of each row, in front; `wanted` is bool ``[batch, time]``."""
    index = jnp.argsort(~wanted, axis=1, stable=True)[:, :count].astype(jnp.int32)
    return Selected(index, jnp.take_along_axis(wanted, index, axis=1))
