"""The definition of the delta rule: token by token, in the dtype of the state."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.arguments import bounded_log_decay
from kernels_pallas.segments import silence
from kernels_pallas.tokens import scan_tokens


def prepare(documents, inputs, dtype):
    """q, k, v, beta and log_decay, the last in the dtype of the state and within bounds; zero at padding."""
    *values, log_decay = inputs
    if log_decay is not None:
        log_decay = bounded_log_decay(log_decay, dtype)
    return tuple(silence(documents, value) for value in (*values, log_decay))


def delta_rule(q, k, v, beta, log_decay, state, documents):
    """q, k [B,T,G,K], v [B,T,H,V], beta [B,T,H], log_decay None, [B,T,H] or [B,T,H,K], state [B,H,K,V].

    Returns y [B,T,H,V] and the state.
    """
    inputs = prepare(documents, (q, k, v, beta, log_decay), state.dtype)
    heads, groups, dtype = v.shape[2], q.shape[2], state.dtype
    read = functools.partial(jnp.einsum, "bhkv,bhk->bhv", precision=jax.lax.Precision.HIGHEST)

    def step(state, token):
        q, k, v, beta, log_decay = token
        q, k = (jnp.repeat(value.astype(dtype), heads // groups, axis=1) for value in (q, k))
        if log_decay is not None:
            decay = jnp.exp(log_decay)
            state = decay.reshape(*decay.shape, *(1,) * (4 - decay.ndim)) * state
        change = beta.astype(dtype)[..., None] * (v.astype(dtype) - read(state, k))
        state = state + k[..., None] * change[..., None, :]
        return state, read(state, q)

    return scan_tokens(step, state, documents, inputs)
