"""Linear cross-entropy in plain JAX for any backend, with the logits of a chunk of tokens alive at a time.

The gradient is computed with the loss, chunk by chunk, while the logits are there: three matmuls in all, as many as
with stored logits, and no logits kept. It is that of `loss + z_loss * squares`, the combination training uses; for any
other one the backward pass computes the logits again. The head's gradient accumulates in float32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.linear_cross_entropy.tokens import Tokens, capped, pulled, total, weight_gradient


class _Options(NamedTuple):
    z_loss: float
    softcap: float | None
    chunk: int
    over: str | None


def default_chunk(tokens: int, vocabulary: int, backend: str) -> int:
    """Tokens per chunk that ran fastest: see the table in `benchmarks/cross_entropy.py`.

    On CPUs the logits of a chunk should stay in the cache, about 8 MiB of them. Accelerators want large matmuls:
    logits are materialised there up to 2 GiB, and cut into chunks of 512 MiB beyond (a choice, not a measurement).
    """
    if backend == "cpu":
        chunk = max(512, 2**21 // vocabulary)
    else:
        chunk = tokens if tokens * vocabulary <= 2**29 else max(1024, 2**27 // vocabulary)
    return min(tokens, chunk)


def sums(x, w, labels, weights, *, z_loss: float, softcap: float | None, chunk: int | None, over: str | None = None):
    """Weighted sums of cross entropy, squared log-normaliser and hits; x [N,D], w [D,V], labels and weights [N].

    `over` is the mesh axis that divides the vocabulary, in a `shard_map`: w and the logits are then a device's part.
    """
    tokens = x.shape[0]
    options = _Options(z_loss, softcap, max(1, tokens if chunk is None else min(chunk, tokens)), over)
    if over is not None:
        labels = labels - jax.lax.axis_index(over) * w.shape[1]
    return _sums(options, x, w, labels, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(options, x, w, labels, weights):
    head = w.astype(x.dtype)

    def step(_, part):
        logits, _ = _logits(options, part[0], head)
        return None, _measure(options, logits, part[1])

    return total(_for_chunks(options, step, None, (x, labels))[1], weights)


def _forward(options, x, w, labels, weights):
    coefficients = weights, options.z_loss * weights
    tokens, dx, dw = _with_gradient(options, x, w, labels, *coefficients)
    return total(tokens, weights), (x, w, labels, weights, tokens, dx, dw)


def _backward(options, residuals, cotangents):
    x, w, labels, weights, tokens, dx, dw = residuals
    # The loss is a sum over devices with a part of the vocabulary each: all of them pull on every part.
    dloss, dsquares, _ = cotangents if options.over is None else jax.lax.psum(cotangents, options.over)

    def stored():
        return dx * dloss.astype(dx.dtype), dw * dloss.astype(dw.dtype)

    def recomputed():
        return _with_gradient(options, x, w, labels, dloss * weights, dsquares * weights)[1:]

    dx, dw = jax.lax.cond(dsquares == options.z_loss * dloss, stored, recomputed)
    dweights = weight_gradient(tokens, *cotangents[:2])
    return dx, dw, None, dweights.astype(weights.dtype)


_sums.defvjp(_forward, _backward)


def _with_gradient(options, x, w, labels, loss_weights, square_weights):
    """What `_measure` says of every token; and dx [N,D], dw [D,V] of the sums with the given weights [N]."""
    head = w.astype(x.dtype)

    def step(dw, part):
        x, labels, loss_weights, square_weights = part
        logits, slope = _logits(options, x, head)
        tokens = _measure(options, logits, labels)
        pull = (loss_weights + 2 * square_weights * tokens.normalisers)[:, None]
        at_label = jnp.where(_is_label(logits, labels), loss_weights[:, None], 0)
        dlogits = pulled(logits, slope, tokens.normalisers[:, None], pull, at_label).astype(x.dtype)
        # XLA's CPU matmul is half as fast when it contracts the rows of its left operand; the barrier prevents it.
        turned = jax.lax.optimization_barrier(x.T)
        dw += jnp.matmul(turned, dlogits, preferred_element_type=dw.dtype)
        dx = jnp.matmul(dlogits, head.T, preferred_element_type=dw.dtype).astype(x.dtype)
        return dw, (tokens, dx)

    zeros = jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32))
    dw, (tokens, dx) = _for_chunks(options, step, zeros, (x, labels, loss_weights, square_weights))
    return tokens, dx, dw.astype(w.dtype)


def _logits(options, x, head):
    """Float32 logits [n, V], and their slope in the products of x and head."""
    products = jnp.matmul(x, head, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
    return capped(products, options.softcap)


def _measure(options, logits, labels) -> Tokens:
    largest = jnp.max(logits, axis=-1)
    if options.over is None:
        normalisers = largest + jnp.log(jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1))
        picked = jnp.take_along_axis(logits, labels[:, None], axis=-1, mode="clip")[:, 0]
    else:
        largest = jax.lax.pmax(largest, options.over)
        powers = jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1)
        here = jnp.sum(jnp.where(_is_label(logits, labels), logits, 0), axis=-1)
        powers, picked = jax.lax.psum((powers, here), options.over)
        normalisers = largest + jnp.log(powers)
    return Tokens(normalisers - picked, normalisers, picked >= largest)


def _is_label(logits, labels):
    return labels[:, None] == jnp.arange(logits.shape[1], dtype=labels.dtype)


def _for_chunks(options, step, carry, values):
    """Fold `carry, outputs = step(carry, part)` over chunks of tokens; outputs are joined in the order of tokens.

    A chunk takes every n-th token, not a run of them, so that where tokens are sharded every chunk is on all devices.
    """
    tokens, chunk = values[0].shape[0], options.chunk
    if chunk == tokens:
        return step(carry, values)
    count = -(-tokens // chunk)

    def split(value):
        padded = jnp.pad(value, [(0, count * chunk - tokens)] + [(0, 0)] * (value.ndim - 1))
        return padded.reshape(chunk, count, *value.shape[1:]).swapaxes(0, 1)

    def join(value):
        return value.swapaxes(0, 1).reshape(count * chunk, *value.shape[2:])[:tokens]

    carry, outputs = jax.lax.scan(step, carry, tuple(split(value) for value in values))
    return carry, jax.tree.map(join, outputs)
