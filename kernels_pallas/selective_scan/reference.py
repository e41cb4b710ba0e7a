"""The definition of the selective scan: token by token, in the dtype of the state."""

import jax
import jax.numpy as jnp

from kernels_pallas.segments import silence
from kernels_pallas.tokens import scan_tokens


def prepare(documents, inputs, dtype):
    """u, dt, B and C, zero at padding."""
    return tuple(silence(documents, value) for value in inputs)


def selective_scan(u, dt, A, B, C, D, state, documents):
    """u, dt [B,T,D], A [D,N], B, C [B,T,N], D [D] or None, state [B,D,N] -> y [B,T,D], state [B,D,N]."""
    inputs = prepare(documents, (u, dt, B, C), state.dtype)
    A, D = (None if value is None else value.astype(state.dtype) for value in (A, D))

    def step(state, token):
        u, dt, B, C = (value.astype(state.dtype) for value in token)
        state = jnp.exp(dt[..., None] * A) * state + (dt * u)[..., None] * B[:, None]
        y = jnp.einsum("bdn,bn->bd", state, C, precision=jax.lax.Precision.HIGHEST)
        return state, y if D is None else y + D * u

    return scan_tokens(step, state, documents, inputs)
