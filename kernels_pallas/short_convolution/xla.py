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


def in_order(x, documents):
    """x [B,T,D] with padding moved to the end of its row, the documents' numbers likewise, and the way back."""
    if documents is None:
        return x, None, lambda y: y
    number, live = documents
    order = jnp.argsort(~live, axis=1, stable=True)
    scattered = jnp.any(live[:, 1:] & ~live[:, :-1])
    moved = _moved(scattered, x, order)
    return (
        moved,
        jnp.take_along_axis(number, order, axis=1),
        lambda y: _moved(scattered, y, jnp.argsort(order, axis=1)),
    )


def _moved(needed, values, order):
    """values [B,T,D] in the given order [B,T] of time, where that is needed at all."""
    return jax.lax.cond(needed, lambda: jnp.take_along_axis(values, order[..., None], axis=1), lambda: values)


def reach(number, taps: int):
    """How many of the taps - 1 tokens before it each token sees, those before the row included: float32 [B,T]."""
    padded, time = jnp.pad(number, ((0, 0), (taps - 1, 0))), number.shape[1]
    same = [padded[:, tap : tap + time] == number for tap in range(taps - 1)]
    return sum((one.astype(jnp.float32) for one in same), jnp.zeros(number.shape, jnp.float32))


def last_inputs(x, state, number, documents):
    """The state after x [B,T,D], its padding at the end: the last inputs of the last document, zeros where missing."""
    kept, time = state.shape[1], x.shape[1]
    if documents is None:
        tail = x[:, max(time - kept, 0) :].astype(state.dtype)
        return jnp.concatenate([state[:, min(time, kept) :], tail], axis=1)
    index = jnp.sum(documents.live, axis=1, dtype=jnp.int32)[:, None] + jnp.arange(-kept, 0, dtype=jnp.int32)
    rows, before = jnp.maximum(index, 0), jnp.minimum(index + kept, kept - 1)
    given = jnp.where(index >= 0, jnp.take_along_axis(number, rows, axis=1), 0)
    mine = given == jnp.max(number, axis=1, keepdims=True)
    new = jnp.take_along_axis(x, rows[..., None], axis=1).astype(state.dtype)
    old = jnp.take_along_axis(state, before[..., None], axis=1)
    return jnp.where(mine[..., None], jnp.where((index >= 0)[..., None], new, old), 0)


def _taps(x, w, bias, state, documents):
    dtype, before, time = state.dtype, w.shape[0] - 1, x.shape[1]
    w, (x, number, back) = w.astype(dtype), in_order(silence(documents, x), documents)
    seen = jnp.concatenate([state, x.astype(dtype)], axis=1)
    numbers = None if number is None else jnp.pad(number, ((0, 0), (before, 0)))
    y = jnp.zeros((), dtype) if bias is None else bias.astype(dtype)
    for tap in range(before + 1):
        values = seen[:, tap : tap + time]
        if number is not None and tap < before:
            values = jnp.where((numbers[:, tap : tap + time] == number)[..., None], values, 0)
        y = y + w[tap] * values
    return back(y.astype(x.dtype)), last_inputs(x, state, number, documents)


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
