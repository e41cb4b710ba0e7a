"""The short convolution in plain JAX for any backend: one shifted multiply-add per tap, its inputs kept alone."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.segments import silence


def short_convolution(x, w, bias, state, documents):
    """x [B,T,D], w [W,D], bias [D] or None, state [B,W-1,D], documents or None.

    Returns y [B,T,D] in x's dtype, not silenced at padding, and the state.
    """
    return _convolve(x, w, bias, state, documents)


def _taps(x, w, bias, state, documents):
    dtype, reach, time = state.dtype, w.shape[0] - 1, x.shape[1]
    w, x = w.astype(dtype), silence(documents, x)
    if documents is not None:
        number, live = documents
        order = jnp.argsort(~live, axis=1, stable=True)
        scattered = jnp.any(live[:, 1:] & ~live[:, :-1])
        x, number = _moved(scattered, x, order), jnp.take_along_axis(number, order, axis=1)
        numbers = jnp.pad(number, ((0, 0), (reach, 0)))
    seen = jnp.concatenate([state, x.astype(dtype)], axis=1)
    y = jnp.zeros((), dtype) if bias is None else bias.astype(dtype)
    for tap in range(reach + 1):
        values = seen[:, tap : tap + time]
        if documents is not None and tap < reach:
            values = jnp.where((numbers[:, tap : tap + time] == number)[..., None], values, 0)
        y = y + w[tap] * values
    y = y.astype(x.dtype)
    if documents is None:
        return y, seen[:, time:]
    last = jnp.sum(live, axis=1, dtype=jnp.int32)[:, None]
    index = last + jnp.arange(reach, dtype=jnp.int32)
    mine = jnp.take_along_axis(numbers, index, axis=1) == jnp.max(number, axis=1, keepdims=True)
    state = jnp.where(mine[..., None], jnp.take_along_axis(seen, index[..., None], axis=1), 0)
    return _moved(scattered, y, jnp.argsort(order, axis=1)), state


def _moved(needed, values, order):
    """values [B,T,D] in the given order [B,T] of time, where that is needed at all."""
    return jax.lax.cond(needed, lambda: jnp.take_along_axis(values, order[..., None], axis=1), lambda: values)


@jax.custom_vjp
def _convolve(x, w, bias, state, documents):
    return _taps(x, w, bias, state, documents)


def _forward(*inputs):
    return _taps(*inputs), inputs


def _backward(inputs, cotangents):
    *values, documents = inputs
    run = functools.partial(_taps, documents=documents)
    return *jax.vjp(run, *values)[1](cotangents), None


_convolve.defvjp(_forward, _backward)
