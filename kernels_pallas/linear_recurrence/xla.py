"""The linear recurrence in plain JAX for any backend: tokens in turn, states kept per chunk, a gradient by hand."""

import jax
import jax.numpy as jnp

from kernels_pallas.chunks import Rule, scan_chunks
from kernels_pallas.linear_recurrence import reference

_UNROLL = 4


def linear_recurrence(log_a, x, state, documents, *, chunk_size: int | None):
    """log_a, x [B,T,D], state [B,D], documents or None -> h [B,T,D] in x's dtype, state [B,D]."""
    if x.shape[1] == 1:
        return reference.linear_recurrence(log_a, x, state, documents)
    size = min(chunk_size or 64, x.shape[1])
    return scan_chunks(_RULE, size, state, documents, (log_a, x))


def _decay(log_a, marks):
    """Time-major decay [C,B,D], 0 where a document starts."""
    decay = jnp.exp(log_a.swapaxes(0, 1))
    return decay if marks is None else jnp.where(marks.starts().T[..., None], 0, decay)


def _states(state, decay, x):
    def step(state, token):
        decay, x = token
        state = decay * state + x.astype(state.dtype)
        return state, state

    return jax.lax.scan(step, state, (decay, x.swapaxes(0, 1)), unroll=_UNROLL)


def _forward(state, marks, inputs, shared):
    log_a, x = inputs
    state, h = _states(state, _decay(log_a, marks), x)
    return state, h.astype(x.dtype).swapaxes(0, 1)


def _backward(state, marks, inputs, shared, dstate, dh):
    log_a, x = inputs
    decay = _decay(log_a, marks)
    _, h = _states(state, decay, x)
    before = jnp.concatenate([state[None], h[:-1]])

    def step(dstate, token):
        decay, dh = token
        dstate = dstate + dh.astype(dstate.dtype)
        return decay * dstate, dstate

    dstate, dx = jax.lax.scan(step, dstate, (decay, dh.swapaxes(0, 1)), reverse=True, unroll=_UNROLL)
    dlog_a = dx * decay * before
    return dstate, (dlog_a.swapaxes(0, 1), dx.swapaxes(0, 1).astype(x.dtype)), ()


_RULE = Rule(reference.prepare, _forward, _backward)
