"""What every implementation of linear cross-entropy computes of a token, and of a logit."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tokens(NamedTuple):
    """Of every token, [N]: cross entropy, log-normaliser, and whether the label has the largest logit."""

    losses: jax.Array
    normalisers: jax.Array
    hits: jax.Array


def total(tokens: Tokens, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted sums of cross entropy, squared log-normaliser and hits."""
    losses, squares = jnp.sum(weights * tokens.losses), jnp.sum(weights * tokens.normalisers**2)
    return losses, squares, jnp.sum(weights * tokens.hits)


def weight_gradient(tokens: Tokens, dloss, dsquares) -> jax.Array:
    """Of the sums of losses and squares with these cotangents, in the weights [N]."""
    return dloss * tokens.losses + dsquares * tokens.normalisers**2


def capped(products, softcap: float | None):
    """Logits out of the products of hidden states and head, and their slope in these."""
    if softcap is None:
        return products, 1
    cap = jnp.tanh(products * (1 / softcap))
    return softcap * cap, 1 - cap * cap


def pulled(logits, slope, normalisers, pulls, labels):
    """The gradient in the products: of one shape, or broadcast to it.

    Args:
        pulls: of each token, its weight in the losses plus 2 * log-normaliser * its weight in the squares.
        labels: where the label is, the token's weight in the losses, else 0.
    """
    return (pulls * jnp.exp(jnp.minimum(logits - normalisers, 0.0)) - labels) * slope
