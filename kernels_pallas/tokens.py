"""The loop over single tokens that every recurrent operator's definition is written in."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.segments import Documents


def scan_tokens(step: Callable, state: jax.Array, documents: Documents | None, inputs):
    """Fold `state, y = step(state, inputs of one token)` over time, from a zero state where a document starts.

    Args:
        step: takes state [B, ...] and the inputs without their time axis; returns the next state, and y [B, ...].
        state: [B, ...] before the first token.
        documents: the documents of the rows, or None for a single one.
        inputs: a pytree of [B, T, ...].

    Returns:
        y [B, T, ...] and the state [B, ...] after the last token.
    """

    def body(state, token):
        reset, values = token
        if reset is not None:
            state = jnp.where(reset.reshape(-1, *(1,) * (state.ndim - 1)), 0, state)
        return step(state, values)

    tokens = (None if documents is None else documents.starts(), inputs)
    if jax.tree.leaves(inputs)[0].shape[1] == 1:
        state, y = body(state, jax.tree.map(lambda value: value[:, 0], tokens))
        return y[:, None], state
    state, y = jax.lax.scan(body, state, jax.tree.map(lambda value: value.swapaxes(0, 1), tokens))
    return y.swapaxes(0, 1), state
