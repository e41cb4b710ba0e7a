"""The linear recurrence as Mosaic GPU kernels for Hopper: channels across threads, time in chunks.

Where rows and channels are too few to fill the chip, the length is cut into spans, see `scan_gpu`. The gradient is the
same recurrence in the other direction, cut the same way. Only the inputs and the state in front of every chunk are
kept between the passes.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import unfit
from kernels_pallas.linear_recurrence import mosaic_gpu_bodies, reference
from kernels_pallas.linear_recurrence.mosaic_gpu_bodies import WIDTH
from kernels_pallas.scan_gpu import RESET, SHARED_BYTES, Plan, cut, entering, spans


def obstacles(log_a, x) -> list[str]:
    """What of the inputs the kernels do not take."""
    return unfit({"log_a": log_a, "x": x}, "float32", "bfloat16")


CHOICES = {"chunk": (16, 32, 64), "spans": (1, 2, 4, 8, 16)}
"""Block sizes that tuning tries."""


def heuristic(log_a, x) -> dict[str, int]:
    """chunk and spans, see `scan_gpu.Plan`.

    With 32 tokens of x in bfloat16 two blocks of the backward pass share a multiprocessor, each with a chunk of 32 KiB
    on its way: about what is needed to keep the memory busy. In float32 half of that leaves room for three.
    """
    chunk = 64 // x.dtype.itemsize
    return {"chunk": chunk, "spans": spans(x.shape[0] * -(-x.shape[2] // WIDTH), -(-x.shape[1] // chunk))}


def linear_recurrence(log_a, x, state, documents, *, blocks, simulated):
    """log_a, x [B,T,D], state [B,D], documents or None -> h [B,T,D] in x's dtype, state [B,D]."""
    (batch, time, channels), size = x.shape, x.dtype.itemsize
    if time == 1:
        h, last = reference.linear_recurrence(log_a, x, state, documents)
        return h.astype(x.dtype), last
    token = WIDTH * (2 * (4 + 2 * size) + 4 + size)  # two buffers of log_a, x and dy; the gradients of log_a and x
    chunk = max(8, min(blocks["chunk"], SHARED_BYTES // token) // 8 * 8)
    length, count = cut(time, chunk, blocks["spans"])
    plan = Plan(
        batch=batch,
        groups=-(-channels // WIDTH),
        width=WIDTH,
        chunk=chunk,
        length=length,
        spans=count,
        simulated=simulated,
    )
    return _scan(plan, log_a, x, state, documents)


def _arranged(plan: Plan, log_a, x, state, documents):
    """The inputs as the kernels take them: zero at padding, all forgotten where a document starts."""
    log_a, x = reference.prepare(documents, (log_a, x), jnp.float32)
    if documents is not None:
        log_a = jnp.where(documents.starts()[..., None], RESET, log_a)
    return plan.tokens(log_a), plan.tokens(x), plan.grouped(state.astype(jnp.float32))


def _decays(plan: Plan, log_a):
    """What a span leaves of the state that enters it [B,S,G,128]."""
    return jnp.exp(jnp.sum(log_a.reshape(plan.batch, plan.spans, -1, plan.groups, WIDTH), axis=2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: Plan, *inputs):
    return _run(plan, *inputs, keep=False)[0]


def _run(plan: Plan, log_a, x, state, documents, *, keep):
    """h and the last state; and the states in front of the chunks if they are to be kept."""
    (_, time, channels), dtype = x.shape, state.dtype
    log_a, x, state = _arranged(plan, log_a, x, state, documents)
    states = state[:, None]
    if plan.spans > 1:
        ends = mosaic_gpu_bodies.ends(plan, log_a, x, reverse=False)
        states = entering(_decays(plan, log_a), ends, state)
    h, kept, ends = mosaic_gpu_bodies.scan(plan, log_a, x, states, keep=keep)
    h = h.reshape(plan.batch, plan.time, -1)[:, :time, :channels]
    return (h, ends[:, -1].reshape(plan.batch, -1)[:, :channels].astype(dtype)), kept


def _forward(plan, *inputs):
    results, kept = _run(plan, *inputs, keep=True)
    return results, (inputs, kept)


def _backward(plan, residuals, cotangents):
    (*values, documents), kept = residuals
    (log_a, x, _), pull = jax.vjp(lambda *values: _arranged(plan, *values, documents), *values)
    dh, dlast = plan.tokens(cotangents[0]), plan.grouped(cotangents[1].astype(jnp.float32))
    states = dlast[:, None]
    if plan.spans > 1:
        ends = mosaic_gpu_bodies.ends(plan, log_a, dh, reverse=True)
        states = entering(_decays(plan, log_a), ends, dlast, reverse=True)
    dlog_a, dx, leaving = mosaic_gpu_bodies.gradients(plan, log_a, x, kept, dh, states)
    return *pull((dlog_a, dx, leaving[:, 0])), None


_scan.defvjp(_forward, _backward)
