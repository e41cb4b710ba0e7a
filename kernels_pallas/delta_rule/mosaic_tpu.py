"""The delta rule on TPUs: one triangular system per chunk and head, the state in VMEM (arXiv 2406.06484, 2412.06464).

The inverse of the system is made in float32 by substitution alone, of runs of 2 tokens merged into runs of 4, 8 and so
on; with nearly parallel keys and beta near 2 any product form of it would be lost. What is subtracted from the values
is float32 too; whatever only leaves the kernel is as precise as the inputs.
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
from kernels_pallas.fold_tpu import Plan, chunk_size, fold, on_values, simulation
from kernels_pallas.segments import silence


def obstacles(q, k, v, beta, log_decay) -> list[str]:
    """What the kernel cannot honour."""
    return heads_tpu.obstacles(k, v, q=q, beta=beta, log_decay=log_decay)


CHOICES = {"chunk": (32, 64, 128)}
"""Block sizes that tuning tries."""


def heuristic(q, k, v, beta, log_decay) -> dict[str, int]:
    """Chunks of 64: the work for the inverse of a chunk grows with its cube."""
    return {"chunk": 64}


def delta_rule(q, k, v, beta, log_decay, state, documents, *, blocks, simulated):
    """q, k [B,T,G,K], v [B,T,H,V], beta [B,T,H], log_decay None, [B,T,H] or [B,T,H,K], state [B,H,K,V].

    Returns y [B,T,H,V] in v's dtype and the state.
    """
    q, k, v, beta = (silence(documents, value) for value in (q, k, v, beta))
    log_decay = heads_tpu.gate(documents, log_decay)
    batch, time, heads, values = v.shape
    chunk = chunk_size(blocks["chunk"], time, power_of_two=True)
    inputs = [heads_tpu.along(value, chunk) for value in (q, k, v)]
    inputs.append(heads_tpu.across(beta.astype(state.dtype), chunk, 1))
    per_channel = log_decay is not None and log_decay.ndim == 4
    if per_channel:
        inputs.append(heads_tpu.along(log_decay, chunk))
    elif log_decay is not None:
        inputs.append(heads_tpu.across(log_decay, chunk, 1))
    marks, marked = heads_tpu.numbers(documents, chunk)
    held = inputs[2][1]
    plan = Plan(
        "delta_rule",
        _PER_CHANNEL if per_channel else _PER_HEAD,
        chunk,
        tuple(layout for _, layout in inputs),
        held,
        v.dtype,
        marks=marked,
        interpret=simulation(simulated),
    )
    start = heads_tpu.side_by_side(state, 1, held.width)
    y, last = fold(plan, start, marks, tuple(value for value, _ in inputs), ())
    return y.reshape(batch, -1, heads, held.width)[:, :time, :, :values], heads_tpu.separate(last, state)


def _inverse(system):
    """(I + system)^-1 for a strictly lower triangular [C, C]: runs of tokens, merged two by two."""
    down, across = order(system.shape[0])
    apart = down ^ across
    inverse = jnp.where(down == across, 1.0, jnp.where(apart == 1, -system, 0))
    for level in range(1, (system.shape[0] - 1).bit_length()):
        between = jnp.where((apart >> level) == 1, system, 0)  # from the first half of a run to its second
        inverse = inverse - matmul(matmul(inverse, between), inverse)
    return inverse


@jax.custom_vjp
def _solve(system, right):
    """u with (I + system) u = right; [C, C] and [C, V]."""
    return matmul(_inverse(system), right)


def _solve_forward(system, right):
    inverse = _inverse(system)
    solved = matmul(inverse, right)
    return solved, (inverse, solved)


def _solve_backward(residuals, change):
    inverse, solved = residuals
    dright = matmul(inverse, change, True)
    down, across = order(inverse.shape[0])
    return jnp.where(down > across, -matmul(dright, solved, False, True), 0), dright


_solve.defvjp(_solve_forward, _solve_backward)


def _per_head(state, marks, inputs, shared):
    q, k, v, beta, *gate = inputs
    decays = head_decays(gate[0] if gate else None, masks(marks), q.shape[0])
    reads, overlaps = (matmul(value, k, False, True) * decays.pairs for value in (q, k))
    return _advance(state, inputs, reads, overlaps, decays)


def _per_channel(state, marks, inputs, shared):
    q, k, v, beta, log_decay = inputs
    documents = masks(marks)
    decays = channel_decays(log_decay, documents)
    down, across = order(q.shape[0])
    own = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=1, keepdims=True)
    reads = jnp.where(down == across, own, channel_pairs(decays, q, k, documents))
    return _advance(state, inputs, reads, channel_pairs(decays, k, k, documents), decays)


def _advance(state, inputs, reads, overlaps, decays):
    """The state after a chunk and y [C, V], from the decayed products of queries, and of keys, with keys [C, C]."""
    q, k, v, beta, *_ = inputs
    down, across = order(q.shape[0])
    beta, dtype = column(beta), v.dtype
    system = jnp.where(down > across, beta * overlaps, 0)
    changes = _solve(system, beta * (v - matmul(k * decays.entering, state)))
    given = changes.astype(dtype)
    y = matmul((q * decays.entering).astype(dtype), state.astype(dtype)) + matmul(reads.astype(dtype), given)
    return decays.whole * state + matmul((k * decays.leaving).astype(dtype), given, True), y


_PER_HEAD = on_values(_per_head)
_PER_CHANNEL = on_values(_per_channel)
