"""The loop over chunks of tokens that the recurrent operators run in, and its gradient.

Between the passes only the inputs and the state in front of every chunk are kept; whatever a chunk computes is computed
again in the backward pass. Time and memory are linear in the number of tokens.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.segments import Documents, Marks


class Rule(NamedTuple):
    """What happens to one chunk; all functions are pure, and defined at module level, so that programs are shared.

    prepare: (documents or marks, inputs, dtype) -> inputs, elementwise: what padding holds and what is out of bounds
        goes, in the other two as in the definition.
    forward: (state, marks, inputs, shared) -> (state, y). inputs and y are pytrees of [B, C, ...]; zero inputs leave
        the state as it is.
    backward: (state, marks, inputs, shared, dstate, dy) -> (dstate, dinputs, dshared), dshared in the state's dtype.
    """

    prepare: Callable
    forward: Callable
    backward: Callable


def recomputed(prepare: Callable, forward: Callable) -> Rule:
    """The rule whose backward is the derivative of `forward`, computed anew."""

    def backward(state, marks, inputs, shared, dstate, dy):
        def run(state, inputs, shared):
            return forward(state, marks, inputs, shared)

        return jax.vjp(run, state, inputs, shared)[1]((dstate, dy))

    return Rule(prepare, forward, backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scan_chunks(rule: Rule, size: int, state: jax.Array, documents: Documents | None, inputs, shared=()):
    """Fold a rule over chunks of `size` tokens, the last one filled up with zeros.

    Args:
        state: the state before the first token.
        documents: the documents of the rows, or None for a single one.
        inputs: pytree of [B, T, ...]. shared: pytree of arrays that every chunk reads.

    Returns:
        y, a pytree of [B, T, ...], and the state after the last token.
    """
    return _run(rule, size, state, documents, inputs, shared, keep=False)[0]


def _run(rule, size, state, documents, inputs, shared, *, keep):
    """y and the last state, and the states in front of the chunks if they are to be kept."""

    def step(state, marks, inputs, _):
        after, y = rule.forward(state, marks, rule.prepare(marks, inputs, state.dtype), shared)
        return after, y, state if keep else None

    last, y, states = _fold(step, state, size, documents, inputs)
    return (y, last), states


def _forward(rule, size, state, documents, inputs, shared):
    results, states = _run(rule, size, state, documents, inputs, shared, keep=True)
    return results, (states, documents, inputs, shared)


def _backward(rule, size, residuals, cotangents):
    states, documents, inputs, shared = residuals
    dy, dstate = cotangents

    def step(carry, marks, parts, state):
        dstate, total = carry
        inputs, pull = jax.vjp(lambda inputs: rule.prepare(marks, inputs, state.dtype), parts[0])
        dstate, dinputs, dshared = rule.backward(state, marks, inputs, shared, dstate, parts[1])
        return (dstate, jax.tree.map(jnp.add, total, dshared)), pull(dinputs)[0], None

    zeros = jax.tree.map(lambda value: jnp.zeros(value.shape, dstate.dtype), shared)
    (dstate, dshared), dinputs, _ = _fold(step, (dstate, zeros), size, documents, (inputs, dy), states, reverse=True)
    return dstate, None, dinputs, jax.tree.map(lambda value, like: value.astype(like.dtype), dshared, shared)


scan_chunks.defvjp(_forward, _backward)


def _fold(step, carry, size, documents, parts, stacked=None, *, reverse=False):
    """Run `carry, outputs, extra = step(carry, marks, parts, stacked)` over chunks, from the last one if `reverse`.

    parts and outputs are pytrees of [B, T, ...], cut along time; stacked and the extras have one entry per chunk.
    """
    time = jax.tree.leaves(parts)[0].shape[1]
    count = -(-time // size)
    parts = jax.tree.map(lambda value: _fill(value, count * size), parts)
    before = None
    if documents is not None:
        documents = Documents(_fill(documents.number, count * size, mode="edge"), _fill(documents.live, count * size))
        before = jnp.pad(documents.number[:, size - 1 : -1 : size], ((0, 0), (1, 0))).swapaxes(0, 1)
    if count == 1:
        marks = None if documents is None else Marks(*documents, before[0])
        first = jax.tree.map(lambda value: value[0], stacked)
        carry, outputs, extra = step(carry, marks, parts, first)
        return carry, jax.tree.map(lambda value: value[:, :time], outputs), jax.tree.map(lambda x: x[None], extra)

    def cut(values, index):
        return jax.tree.map(lambda value: jax.lax.dynamic_slice_in_dim(value, index * size, size, 1), values)

    def chunk(carry, index, before, stacked):
        marks = None if documents is None else Marks(*cut(documents, index), before)
        return step(carry, marks, cut(parts, index), stacked)

    def body(carry, chunked):
        carry, buffers = carry
        carry, outputs, extra = chunk(carry, *chunked)
        start = chunked[0] * size

        def put(buffer, value):
            return jax.lax.dynamic_update_slice_in_dim(buffer, value, start, 1)

        return (carry, jax.tree.map(put, buffers, outputs)), extra

    chunks = jnp.arange(count, dtype=jnp.int32), before, stacked
    _, outputs, _ = jax.eval_shape(chunk, carry, *jax.tree.map(lambda value: value[0], chunks))
    buffers = jax.tree.map(lambda x: jnp.zeros((x.shape[0], count * size, *x.shape[2:]), x.dtype), outputs)
    (carry, buffers), extras = jax.lax.scan(body, (carry, buffers), chunks, reverse=reverse)
    return carry, jax.tree.map(lambda value: value[:, :time], buffers), extras


def _fill(value, time, mode="constant"):
    """`value` [B, T, ...] made `time` long."""
    missing = time - value.shape[1]
    if missing == 0:
        return value
    return jnp.pad(value, [(0, 0), (0, missing)] + [(0, 0)] * (value.ndim - 2), mode=mode)
