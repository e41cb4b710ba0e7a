"""Experts choose tokens (Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", section 3.2).

Each takes those that score highest with it, so that loads are equal and a token has as many experts as choose it,
perhaps none. Which tokens an expert takes depends on later tokens, in training and evaluation too: what a model so
trained makes of a row is not what it could make of the row's beginning, and it has no decode.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from efficient_lm.models.ffns.experts.dispatch import Compute, Over
from efficient_lm.models.layers.groups import Groups


class Chosen(NamedTuple):
    """int32 tokens, counted over the batch, and float32 weights of every place of an expert, ``[experts, places]``.

    An empty place has the number of tokens there are, and weight 0.
    """

    tokens: jax.Array
    weights: jax.Array

    def routes(self, batch: int, time: int) -> jax.Array:
        """int32 ``[batch, time, experts]``: the expert's number where it took the token, -1 elsewhere."""
        experts = jnp.broadcast_to(jnp.arange(len(self.tokens))[:, None], self.tokens.shape)
        empty = jnp.full((batch * time, len(self.tokens)), -1, jnp.int32)
        return empty.at[self.tokens, experts].set(experts, mode="drop").reshape(batch, time, -1)

    def __call__(self, compute: Compute, x: jax.Array) -> jax.Array:
        """`x [tokens, width]` through the experts that chose each → float32 ``[tokens, width]``, weighted and added."""
        places = self.tokens.reshape(-1)
        rows = compute(x.at[places].get(mode="fill", fill_value=0), Groups())
        weighted = rows.astype(jnp.float32) * self.weights.reshape(-1, 1)
        return jnp.zeros(x.shape, jnp.float32).at[places].add(weighted, mode="drop")


def chosen(scores: jax.Array, live: jax.Array, places: int, over: Over) -> Chosen:
    """The tokens with each expert's `places` highest scores, of every row or of all rows; padding is not chosen.

    Args:
        scores: ``[batch, time, experts]``, above 0. live: bool ``[batch, time]``, False for padding.
    """
    batch, time, experts = scores.shape
    ranking = jnp.where(live[..., None], scores, -1.0)
    ranking = ranking if over == "sequence" else ranking.reshape(1, batch * time, experts)
    weights, index = jax.lax.top_k(ranking.swapaxes(1, 2), places)  # [parts, experts, places]
    tokens = index + ranking.shape[1] * jnp.arange(len(ranking))[:, None, None]
    tokens = jnp.where(weights < 0, batch * time, tokens)
    by_expert = (values.swapaxes(0, 1).reshape(experts, -1) for values in (tokens, jnp.maximum(weights, 0.0)))
    return Chosen(*by_expert)
