"""Linear attention on TPUs: matmuls within chunks, the states of one or several heads in VMEM (arXiv 2312.06635).

Heads that share queries and keys lie side by side, so that their scores are computed once and one matmul reads or
writes all their states; decays per head scale values, never keys. With a decay per channel every head is on its own.
"""

import jax
import jax.numpy as jnp

from kernels_pallas import heads_tpu
from kernels_pallas.decay_tpu import (
    channel_decays,
    channel_pairs,
    column,
    head_decays,
    masks,
    matmul,
    order,
)
from kernels_pallas.fold_tpu import LANES, Plan, Tokens, chunk_size, fold, on_values, simulation
from kernels_pallas.segments import silence


def obstacles(q, k, v, log_decay) -> list[str]:
    """What the kernel cannot honour."""
    return heads_tpu.obstacles(k, v, q=q, log_decay=log_decay)


CHOICES = {"chunk": (64, 128, 256), "values": (128, 256, 512)}
"""Block sizes that tuning tries."""


def heuristic(q, k, v, log_decay) -> dict[str, int]:
    """Chunks of 128, a tile of the matrix unit, and up to 512 lanes of values that share keys.

    With a decay per channel chunks of 64, in which the six matmuls of the pairs cost about as much as the states.
    """
    return {"chunk": 64 if log_decay is not None and log_decay.ndim == 4 else 128, "values": 512}


def linear_attention(q, k, v, log_decay, state, documents, *, blocks, simulated):
    """q, k [B,T,G,K], v [B,T,H,V], log_decay None, [B,T,H] or [B,T,H,K], state [B,H,K,V] -> y as v, state."""
    batch, time, heads, values = v.shape
    per_channel = log_decay is not None and log_decay.ndim == 4
    q, k, v = (silence(documents, value) for value in (q, k, v))
    log_decay = heads_tpu.gate(documents, log_decay)
    chunk = chunk_size(blocks["chunk"], time, power_of_two=per_channel)
    if per_channel:
        together, width = 1, LANES
        gates = [heads_tpu.along(log_decay, chunk)]
    else:
        together, width = _together(values, heads // q.shape[2], blocks["values"])
        gates = [] if log_decay is None else [heads_tpu.across(log_decay, chunk, together)]
    v, held = heads_tpu.along(v, chunk, width)
    held = Tokens(held.width * together, heads // together)
    inputs = [heads_tpu.along(q, chunk), heads_tpu.along(k, chunk), (v, held), *gates]
    marks, marked = heads_tpu.numbers(documents, chunk)
    plan = Plan(
        "linear_attention",
        _PER_CHANNEL if per_channel else _PER_HEAD,
        chunk,
        tuple(layout for _, layout in inputs),
        held,
        v.dtype,
        marks=marked,
        interpret=simulation(simulated),
    )
    given = tuple(value for value, _ in inputs)
    y, last = fold(plan, heads_tpu.side_by_side(state, together, width), marks, given, ())
    y = y.reshape(batch, -1, heads, held.width // together)[:, :time, :, :values]
    return y, heads_tpu.separate(last, state)


def _together(values: int, sharing: int, most: int) -> tuple[int, int]:
    """How many of the heads that share keys are in a block, and what the width of their values is a multiple of."""
    half = LANES // 2
    width = half if values <= half and sharing % 2 == 0 else LANES
    each = -(-values // width) * width
    able = [n for n in range(1, sharing + 1) if sharing % n == 0 and n * each % LANES == 0]
    return max([n for n in able if n * each <= most] or able[:1]), width


def _spread(values, width):
    """[C, 1] or [1, 1] of every head, as [C, heads * width]; of a single head as they are."""
    if len(values) == 1:
        return values[0]
    lane = jax.lax.broadcasted_iota(jnp.int32, (values[0].shape[0], len(values) * width), 1)
    spread = jnp.broadcast_to(values[0], lane.shape)
    for head in range(1, len(values)):
        spread = jnp.where(lane >= head * width, values[head], spread)
    return spread


def _head_parts(marks, inputs):
    """The decays of every head, these spread over its values, and where its values are."""
    q, _, v, *gates = inputs
    chunk, heads = q.shape[0], gates[0].shape[0] if gates else 1
    width, documents = v.shape[1] // heads, masks(marks)
    rows = [gates[0][i : i + 1] for i in range(heads)] if gates else [None]
    decays = [head_decays(row, documents, chunk) for row in rows]
    spread = (_spread([getattr(decay, name) for decay in decays], width) for name in ("entering", "leaving", "whole"))
    return decays, *spread, [slice(i * width, (i + 1) * width) for i in range(heads)]


def _joined(parts):
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _forward(state, marks, inputs, shared):
    q, k, v, *_ = inputs
    decays, entering, leaving, whole, own = _head_parts(marks, inputs)
    scores = matmul(q, k, False, True)
    weights = [(scores * decay.pairs).astype(v.dtype) for decay in decays]
    near = _joined([matmul(weight, v[:, lanes]) for weight, lanes in zip(weights, own, strict=True)])
    y = near + entering * matmul(q, state.astype(q.dtype))
    return whole * state + matmul(k, (leaving * v).astype(v.dtype), True), y


def _backward(state, marks, inputs, shared, dstate, dy):
    q, k, v, *gates = inputs
    decays, entering, leaving, whole, own = _head_parts(marks, inputs)
    scores = matmul(q, k, False, True)
    read, written = entering * dy, leaving * v
    reading, writing = read.astype(dy.dtype), written.astype(v.dtype)
    from_state, to_state = matmul(q, state.astype(q.dtype)), leaving * matmul(k, dstate.astype(k.dtype))
    dscores, dnear, dgates = jnp.zeros_like(scores), [], []
    for decay, lanes in zip(decays, own, strict=True):
        dweights = matmul(dy[:, lanes], v[:, lanes], False, True)
        dscores = dscores + dweights * decay.pairs
        weights = scores * decay.pairs
        dnear.append(matmul(weights.astype(dy.dtype), dy[:, lanes], True))
        if gates:
            kept = jnp.sum(decay.whole * state[:, lanes] * dstate[:, lanes], axis=0, keepdims=True)
            gained = jnp.sum((read * from_state)[:, lanes], axis=1, keepdims=True)
            lost = jnp.sum((v * to_state)[:, lanes], axis=1, keepdims=True)
            dgates.append(_decay_gradient(dweights * weights, gained, lost, jnp.sum(kept, axis=1, keepdims=True)))
    dscores = dscores.astype(q.dtype)
    dq = matmul(dscores, k) + matmul(reading, state.astype(dy.dtype), False, True)
    dk = matmul(dscores, q, True) + matmul(writing, dstate.astype(v.dtype), False, True)
    before = whole * dstate + matmul(q, reading, True)
    dgates = (jnp.concatenate(dgates, axis=0),) if gates else ()
    return before, (dq, dk, _joined(dnear) + to_state, *dgates), ()


def _decay_gradient(moved, gained, lost, kept):
    """[1, C]: what a decay scales, all that is read after it of what was written before it.

    Args:
        moved: [C, C] from token to token. gained, lost: [C, 1] from the state before, to the state after the chunk.
        kept: [1, 1] from state to state.
    """
    down, across = order(moved.shape[0])
    moved = jnp.where(down > across, moved, 0)
    gained = gained + jnp.sum(moved, axis=1, keepdims=True) - column(jnp.sum(moved, axis=0, keepdims=True))
    later = jnp.where(down >= across, gained, 0) + jnp.where(down < across, lost, 0)
    return jnp.sum(later, axis=0, keepdims=True) + kept


def _channel_forward(state, marks, inputs, shared):
    q, k, v, log_decay = inputs
    documents = masks(marks)
    decays = channel_decays(log_decay, documents)
    down, across = order(q.shape[0])
    own = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=1, keepdims=True)
    weights = jnp.where(down == across, own, channel_pairs(decays, q, k, documents))
    near = matmul(weights.astype(v.dtype), v)
    y = near + matmul((q * decays.entering).astype(q.dtype), state.astype(q.dtype))
    return decays.whole * state + matmul((k * decays.leaving).astype(k.dtype), v, True), y


_PER_HEAD = on_values(_forward, _backward)
_PER_CHANNEL = on_values(_channel_forward)
