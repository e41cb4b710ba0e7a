"""The definition of linear attention: token by token, in the dtype of the state."""

import jax
import jax.numpy as jnp

from kernels_pallas.arguments import bounded_log_decay
from kernels_pallas.segments import silence
from kernels_pallas.tokens import scan_tokens


def prepare(documents, inputs, dtype):
    """q, k, v and log_decay, the last in the dtype of the state and within bounds; zero at padding."""
    *values, log_decay = inputs
    if log_decay is not None:
        log_decay = bounded_log_decay(log_decay, dtype)
    return tuple(silence(documents, value) for value in (*values, log_decay))


def linear_attention(q, k, v, log_decay, state, documents):
    """q, k [B,T,G,K], v [B,T,H,V], log_decay None, [B,T,H] or [B,T,H,K], state [B,H,K,V] -> y [B,T,H,V], state."""
    inputs = prepare(documents, (q, k, v, log_decay), state.dtype)
    heads, groups, dtype = v.shape[2], q.shape[2], state.dtype

    def step(state, token):
        q, k, v, log_decay = token
        q, k = (jnp.repeat(value.astype(dtype), heads // groups, axis=1) for value in (q, k))
        if log_decay is not None:
            decay = jnp.exp(log_decay)
            state = decay.reshape(*decay.shape, *(1,) * (4 - decay.ndim)) * state
        state = state + k[..., None] * v.astype(dtype)[..., None, :]
        return state, jnp.einsum("bhkv,bhk->bhv", state, q, precision=jax.lax.Precision.HIGHEST)

    return scan_tokens(step, state, documents, inputs)
