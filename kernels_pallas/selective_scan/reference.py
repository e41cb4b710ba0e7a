"""The definition of the selective scan: token by token, in the dtype of the state."""

import jax
import jax.numpy as jnp

from kernels_pallas.tokens import scan_tokens


def selective_scan(u, dt, A, B, C, state, document):
    """u, dt [B,T,D], A [D,N], B, C [B,T,N], state [B,D,N], document [B,T] or None -> y [B,T,D], state [B,D,N]."""
    A = A.astype(state.dtype)

    def step(state, token):
        u, dt, B, C = (value.astype(state.dtype) for value in token)
        state = jnp.exp(dt[..., None] * A) * state + (dt * u)[..., None] * B[:, None]
        return state, jnp.einsum("bdn,bn->bd", state, C, precision=jax.lax.Precision.HIGHEST)

    return scan_tokens(step, state, document, (u, dt, B, C))
