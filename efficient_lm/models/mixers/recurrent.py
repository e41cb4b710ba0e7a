"""What every mixer with a recurrent state shares: which document the state belongs to, and carrying it on."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from efficient_lm.models.context import Context
from efficient_lm.models.mixers.base import Cache
from efficient_lm.models.parameters import Uniform

Implementation = Literal["auto", "reference", "xla", "pallas"]
"""Which form of an operator of `kernels_pallas` a recurrent mixer runs."""

SHORTEST_STEP = 1e-4


def time_step(log: jax.Array) -> jax.Array:
    """The bias whose softplus is a step Δ, from Δ's logarithm; Δ is at least 1e-4."""
    step = jnp.maximum(jnp.exp(log), SHORTEST_STEP)
    return step + jnp.log(-jnp.expm1(-step))


TIME_STEP = Uniform(math.log(1e-3), math.log(0.1), time_step)
"""Start of the bias of Δ: steps log-uniform between 0.001 and 0.1 (Gu & Dao 2023, arXiv 2312.00752, section 3.6)."""


def documents(context: Context, cache: Cache | None) -> jax.Array | None:
    """Segment ids for the operators, int32 ``[batch, time]``; None where each row is one document without padding."""
    return context.segment_ids if context.packed or cache is not None else None


def entering(cache: Cache | None, context: Context) -> Cache:
    """The states a piece begins with: those of the cache, zero where its first token begins another document.

    Without a cache this is empty, so that ``entering(cache, context).get("state")`` is None.
    """
    if cache is None:
        return {}
    live = context.segment_ids != 0
    first = jnp.take_along_axis(context.segment_ids, jnp.argmax(live, axis=1)[:, None], axis=1)[:, 0]
    same = first == cache["segment"]
    return {
        name: jnp.where(same.reshape(-1, *[1] * (state.ndim - 1)), state, jnp.zeros_like(state))
        for name, state in cache.items()
        if name != "segment"
    }


def leaving(cache: Cache | None, context: Context, **states: jax.Array) -> Cache | None:
    """The cache after a piece: its states in the dtypes of the old ones, and the document of its last token.

    A piece of padding alone leaves everything as it was.
    """
    if cache is None:
        return None
    length = context.segment_ids.shape[1]
    live = context.segment_ids != 0
    last = jnp.max(jnp.where(live, jnp.arange(length)[None], -1), axis=1)
    found = jnp.take_along_axis(context.segment_ids, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
    any_live = last >= 0
    kept = {
        name: jnp.where(any_live.reshape(-1, *[1] * (state.ndim - 1)), state.astype(cache[name].dtype), cache[name])
        for name, state in states.items()
    }
    return {**kept, "segment": jnp.where(any_live, found, cache["segment"])}


def empty(batch: int, **states: jax.Array) -> Cache:
    """A cache of these states, of no document yet."""
    return {**states, "segment": jnp.zeros((batch,), jnp.int32)}
