"""The definition of the linear recurrence: token by token, in the dtype of the state."""

import jax.numpy as jnp

from kernels_pallas.tokens import scan_tokens


def linear_recurrence(log_a, x, state, document):
    """log_a, x [B,T,D], state [B,D], document [B,T] or None -> h [B,T,D], state [B,D]."""

    def step(state, token):
        log_a, x = token
        state = jnp.exp(log_a) * state + x.astype(state.dtype)
        return state, state

    return scan_tokens(step, state, document, (log_a, x))
