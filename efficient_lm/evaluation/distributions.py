"""Two models' distributions of the next token, compared at every place of a text."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efficient_lm.evaluation.rows import pieces
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters
from efficient_lm.objectives.base import context_of

Pair = tuple[LanguageModel, Parameters]


def compared(
    first: Pair,
    second: Pair,
    batch: Mapping[str, jax.Array],
    compare: Callable[[jax.Array, jax.Array], jax.Array],
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """The sum over a batch of what a comparison finds, by the batch's weights; traceable.

    Args:
        first, second: models over one vocabulary, with their parameters.
        batch: `tokens`, `segment_ids`, `positions` int32 and `weights` float32 ``[batch, time]``.
        compare: of two rows of float32 log-probabilities ``[time, vocab]``, a value for each place ``[time]``.
        dtype: of the computation of hidden states.
    """
    context = context_of(batch)
    hidden = [model.hidden(params, batch["tokens"], context, dtype=dtype)[0] for model, params in (first, second)]

    def of_row(row: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        *both, weights = row
        logits = [model.logits_from(params, part) for (model, params), part in zip((first, second), both, strict=True)]
        found = compare(*map(jax.nn.log_softmax, logits))
        return jnp.sum(jnp.where(weights > 0, found, 0.0) * weights)

    # Row by row: logits of a whole batch may not fit.
    return jnp.sum(lax.map(of_row, (*hidden, batch["weights"])))


def divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """Kullback-Leibler divergence from `p` to `q`, nats, of log-probabilities ``[..., vocab]``."""
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def overlap(p: jax.Array, q: jax.Array) -> jax.Array:
    """``sum(min(p, q))`` of log-probabilities ``[..., vocab]``: how likely speculative sampling accepts a token that is
    drafted from `q` and verified by `p` (Leviathan et al. 2023, theorem 3.5)."""
    return jnp.sum(jnp.exp(jnp.minimum(p, q)), axis=-1)


def acceptance(whole: Pair, draft: Pair, batch: Mapping[str, Any], dtype: jax.typing.DTypeLike = jnp.float32) -> float:
    """The mean `overlap` of a model with one that drafts for it, over the places that a batch weighs.

    Args:
        whole, draft: models over one vocabulary, with their parameters.
        batch: rows of text (see `efficient_lm.data.packing.pack`).
        dtype: of the computation.
    """

    @jax.jit
    def total(verifying: Parameters, drafting: Parameters, part: Mapping[str, jax.Array]) -> jax.Array:
        return compared((whole[0], verifying), (draft[0], drafting), part, overlap, dtype)

    sums = [total(whole[1], draft[1], part) for part in pieces(batch)]
    return float(np.sum(np.asarray(sums), dtype=np.float64) / np.sum(batch["weights"], dtype=np.float64))
