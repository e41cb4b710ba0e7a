"""The selective scan as Mosaic GPU kernels for Hopper: channels across lanes, states in registers, time in chunks.

Where rows and channels are too few to fill the chip, the length is cut into spans, see `scan_gpu`. The gradient is the
same recurrence in the other direction, cut the same way. Only the inputs and the state in front of every chunk are
kept between the passes; sums over rows, spans and blocks of channels are partial sums that XLA adds up.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import unfit
from kernels_pallas.scan_gpu import LOG2E, RESET, SHARED_BYTES, cut, entering, fill, spans
from kernels_pallas.selective_scan import mosaic_gpu_backward, mosaic_gpu_forward, reference
from kernels_pallas.selective_scan.mosaic_gpu_plan import WARPS, Plan, width


def obstacles(u, dt, A, B, C, D) -> list[str]:
    """What of the inputs the kernels do not take."""
    reasons = unfit({"u": u, "dt": dt, "A": A, "B": B, "C": C, "D": D}, "float32", "bfloat16")
    return reasons + [f"{B.shape[2]} states per channel (at most 64)"] * (B.shape[2] > 64)


CHOICES = {"chunk": (8, 16, 32), "part": (2, 4), "spans": (1, 2, 4, 8, 16)}
"""Block sizes that tuning tries."""


def heuristic(u, dt, A, B, C, D) -> dict[str, int]:
    """chunk, part and spans, see `Plan`.

    Four tokens of decays and states are 128 of a thread's registers, which leaves two blocks on a multiprocessor; with
    16 tokens in a chunk, and inputs in bfloat16, its shared memory holds two as well. Longer chunks keep fewer states
    and leave room for one block.
    """
    chunk = 16
    blocks = u.shape[0] * -(-u.shape[2] // (WARPS * width(_states(B))))
    return {"chunk": chunk, "part": 4, "spans": spans(blocks, -(-u.shape[1] // chunk))}


def selective_scan(u, dt, A, B, C, D, state, documents, *, blocks, simulated):
    """u, dt [B,T,D], A [D,N], B, C [B,T,N], D [D] or None, state [B,D,N] -> y [B,T,D] in u's dtype, state [B,D,N]."""
    if u.shape[1] == 1:
        y, last = reference.selective_scan(u, dt, A, B, C, D, state, documents)
        return y.astype(u.dtype), last
    return _scan(_planned(u, dt, B, blocks, simulated), u, dt, A, B, C, D, state, documents)


def _states(B) -> int:
    return max(8, 1 << (B.shape[2] - 1).bit_length())


def _planned(u, dt, B, blocks, simulated) -> Plan:
    batch, time, channels = u.shape
    part, states = blocks["part"], _states(B)
    group = WARPS * width(states)
    chunk = max(8, min(blocks["chunk"], SHARED_BYTES // _token_bytes(u, dt, group, states, part)) // 8 * 8)
    length, count = cut(time, chunk, blocks["spans"])
    return Plan(
        batch=batch,
        groups=-(-channels // group) * WARPS,
        width=width(states),
        chunk=chunk,
        length=length,
        spans=count,
        simulated=simulated,
        states=states,
        part=part,
    )


def _token_bytes(u, dt, group, states, part) -> int:
    """Shared memory of the backward kernel for each token of a chunk: two buffers of u, dt, dy, B, C and the mark; du
    and ddt; dB and dC of every warp; and a share of the states in front of the parts."""
    channels = group * (5 * u.dtype.itemsize + 3 * dt.dtype.itemsize)
    return channels + 4 * (2 * states * (2 + WARPS) + 2 + group * states // part)


def _arranged(plan: Plan, u, dt, A, B, C, D, state, documents):
    """The inputs as the kernels take them, zero at padding: u, dt, projections, A, D and state."""
    u, dt, B, C = reference.prepare(documents, (u, dt, B, C), jnp.float32)
    B, C = (fill(x.astype(jnp.float32), axis1=plan.time, axis2=plan.states) for x in (B, C))
    D = jnp.zeros(u.shape[2:], jnp.float32) if D is None else D.astype(jnp.float32)
    return (
        plan.tokens(u),
        plan.tokens(dt),
        jnp.concatenate([B, C], axis=2),
        _tiled(plan, A.astype(jnp.float32) * LOG2E),
        plan.grouped(D),
        _tiled(plan, state.astype(jnp.float32)),
    )


def _tiled(plan: Plan, value):
    """[...,D,N] -> [...,G,N,W]."""
    value = plan.grouped(value.swapaxes(-1, -2))
    return fill(value, **{f"axis{value.ndim - 3}": plan.states}).swapaxes(-3, -2)


def _marks(plan: Plan, documents):
    if documents is None:
        return None
    return fill(jnp.where(documents.starts(), jnp.float32(RESET), 0), axis1=plan.time)


def _decays(plan: Plan, dt, marks, A):
    """What a span leaves of the state that enters it [B,S,G,N,W]."""
    cut = plan.batch, plan.spans, plan.length * plan.chunk
    steps = jnp.sum(dt.reshape(*cut, *dt.shape[2:]), axis=2, dtype=jnp.float32)
    decays = jnp.exp2(steps[..., None, :] * A)
    if marks is None:
        return decays
    return jnp.where(jnp.any(marks.reshape(cut) < 0, axis=2)[..., None, None, None], 0, decays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: Plan, *inputs):
    return _run(plan, *inputs, keep=False)[0]


def _run(plan: Plan, u, dt, A, B, C, D, state, documents, *, keep):
    """y and the last state; and the states in front of the chunks if they are to be kept."""
    arranged = _arranged(plan, u, dt, A, B, C, D, state, documents)
    (v, steps, projections, rates, skip, first), marks = arranged, _marks(plan, documents)
    states = first[:, None]
    if plan.spans > 1:
        ends = mosaic_gpu_forward.ends(plan, v, steps, projections, marks, rates, reverse=False)
        states = entering(_decays(plan, steps, marks, rates), ends, first)
    y, kept, ends = mosaic_gpu_forward.scan(plan, v, steps, projections, marks, rates, skip, states, keep=keep)
    y = y.reshape(*y.shape[:2], plan.channels)[:, : u.shape[1], : u.shape[2]]
    last = ends[:, -1].swapaxes(-1, -2).reshape(plan.batch, plan.channels, plan.states)
    return (y, last[:, : A.shape[0], : A.shape[1]].astype(state.dtype)), kept


def _forward(plan, *inputs):
    results, kept = _run(plan, *inputs, keep=True)
    return results, (inputs, kept)


def _backward(plan, residuals, cotangents):
    (*values, documents), kept = residuals
    arranged, pull = jax.vjp(lambda *values: _arranged(plan, *values, documents), *values)
    (u, dt, projections, A, D, _), marks = arranged, _marks(plan, documents)
    dy, dlast = plan.tokens(cotangents[0]), _tiled(plan, cotangents[1].astype(jnp.float32))
    states = dlast[:, None]
    if plan.spans > 1:
        ends = mosaic_gpu_forward.ends(plan, dy, dt, projections, marks, A, reverse=True)
        states = entering(_decays(plan, dt, marks, A), ends, dlast, reverse=True)
    of = mosaic_gpu_backward.gradients(plan, u, dt, projections, marks, A, D, kept, dy, states)
    sums = of["dprojections"].sum(0), of["dA"].sum((0, 1)), of["dD"].sum((0, 1))
    return *pull((of["du"], of["ddt"], *sums, of["leaving"][:, 0])), None


_scan.defvjp(_forward, _backward)
