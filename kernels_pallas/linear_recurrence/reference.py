"""The definition of the linear recurrence: token by token, in the dtype of the state."""

import jax.numpy as jnp

from kernels_pallas.arguments import bounded_log_decay
from kernels_pallas.segments import silence
from kernels_pallas.tokens import scan_tokens


def prepare(documents, inputs, dtype):
    """log_a in the dtype of the state and within bounds, and x; zero at padding."""
    log_a, x = inputs
    return silence(documents, bounded_log_decay(log_a, dtype)), silence(documents, x)


def linear_recurrence(log_a, x, state, documents):
    """log_a, x [B,T,D], state [B,D], documents or None -> h [B,T,D], state [B,D]."""
    inputs = prepare(documents, (log_a, x), state.dtype)

    def step(state, token):
        log_a, x = token
        state = jnp.exp(log_a) * state + x.astype(state.dtype)
        return state, state

    return scan_tokens(step, state, documents, inputs)
