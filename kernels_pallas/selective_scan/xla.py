"""The selective scan in plain JAX for any backend: tokens in turn, states kept per chunk, a gradient by hand.

States are laid out [B, N, D], channels last, so that every operation runs along them.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.chunks import Rule, scan_chunks
from kernels_pallas.selective_scan import reference


def selective_scan(u, dt, A, B, C, D, state, documents, *, chunk_size: int | None):
    """u, dt [B,T,D], A [D,N], B, C [B,T,N], D [D] or None, state [B,D,N] -> y [B,T,D] in u's dtype, state [B,D,N]."""
    if u.shape[1] == 1:
        return reference.selective_scan(u, dt, A, B, C, D, state, documents)
    size = min(chunk_size or 32, u.shape[1])
    y, state = scan_chunks(_RULE, size, state.swapaxes(1, 2), documents, (u, dt, B, C), (A.T, D))
    return y, state.swapaxes(1, 2)


def _tokens(dtype, *values):
    return tuple(value.swapaxes(0, 1).astype(dtype) for value in values)


def _starts(marks):
    return None if marks is None else marks.starts().T


def _decayed(state, dt, A, start):
    """exp(dt A) state, zero where a document starts; dt [B,D], A [N,D], state [B,N,D], start [B]."""
    state = jnp.exp(dt[:, None] * A) * state
    return state if start is None else jnp.where(start[:, None, None], 0, state)


def _forward(state, marks, inputs, shared):
    A, D = (None if value is None else value.astype(state.dtype) for value in shared)

    def step(state, token):
        (u, dt, B, C), start = token
        state = _decayed(state, dt, A, start) + (dt * u)[:, None] * B[..., None]
        y = jnp.einsum("bnd,bn->bd", state, C)
        return state, (y if D is None else y + D * u).astype(inputs[0].dtype)

    state, y = jax.lax.scan(step, state, (_tokens(state.dtype, *inputs), _starts(marks)))
    return state, y.swapaxes(0, 1)


def _backward(state, marks, inputs, shared, dstate, dy):
    A, D = (None if value is None else value.astype(state.dtype) for value in shared)
    u, dt, B, C, dy = _tokens(state.dtype, *inputs, dy)
    starts = _starts(marks)

    def recompute(state, token):
        u, dt, B, dy, start = token
        after = _decayed(state, dt, A, start) + (dt * u)[:, None] * B[..., None]
        return after, (state, jnp.einsum("bnd,bd->bn", after, dy))

    _, (before, dC) = jax.lax.scan(recompute, state, (u, dt, B, dy, starts))

    def step(carry, token):
        dstate, dA = carry
        (u, dt, B, C, dy, start), before = token
        dstate = dstate + C[..., None] * dy[:, None]
        du, dB = jnp.einsum("bnd,bn->bd", dstate, B), jnp.einsum("bnd,bd->bn", dstate, dt * u)
        dstate = _decayed(dstate, dt, A, start)
        ddecay = dstate * before
        dA = dA + jnp.sum(ddecay * dt[:, None], axis=0)
        return (dstate, dA), (dt * du, u * du + jnp.sum(ddecay * A, axis=1), dB)

    carry = dstate, jnp.zeros_like(A)
    (dstate, dA), (du, ddt, dB) = jax.lax.scan(step, carry, ((u, dt, B, C, dy, starts), before), reverse=True)
    dD = None
    if D is not None:
        du, dD = du + D * dy, jnp.einsum("cbd,cbd->d", u, dy)
    gradients = zip((du, ddt, dB, dC), inputs, strict=True)
    return dstate, tuple(new.swapaxes(0, 1).astype(old.dtype) for new, old in gradients), (dA, dD)


_RULE = Rule(reference.prepare, _forward, _backward)
