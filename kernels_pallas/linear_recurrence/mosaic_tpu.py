"""The linear recurrence on TPUs: channels along lanes, 16 tokens at a time by doubling, the last state carried on."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.dispatch import unfit
from kernels_pallas.fold_tpu import (
    LANES,
    TOKENS,
    Plan,
    Rule,
    Tokens,
    channel_block,
    chunk_size,
    fill,
    fold,
    roll,
    simulation,
)
from kernels_pallas.segments import silence


def obstacles(log_a, x) -> list[str]:
    """What the kernel cannot honour."""
    return unfit({"log_a": log_a, "x": x}, "float32", "bfloat16")


CHOICES = {"chunk": (64, 128, 256, 512), "channels": (128, 256, 512)}
"""Block sizes that tuning tries."""


def heuristic(log_a, x) -> dict[str, int]:
    """256 tokens of 512 channels: two megabytes of buffers forward, and long transfers."""
    return {"chunk": 256, "channels": 512}


def linear_recurrence(log_a, x, state, documents, *, blocks, simulated):
    """log_a, x [B,T,D], state [B,D], documents or None -> h [B,T,D] in x's dtype, state [B,D]."""
    (batch, time, channels), chunk = x.shape, chunk_size(blocks["chunk"], x.shape[1])
    log_a, x = (silence(documents, value) for value in (log_a, x))
    if documents is not None:
        log_a = jnp.where(documents.starts()[..., None], -jnp.inf, log_a)
    inputs = tuple(fill(fill(value, 1, chunk), 2, LANES) for value in (log_a, x))
    width = channel_block(inputs[0].shape[2], blocks["channels"])
    parts = inputs[0].shape[2] // width
    layout = Tokens(width, parts)
    plan = Plan(
        "linear_recurrence",
        _RULE,
        chunk,
        (layout, layout),
        layout,
        x.dtype,
        scratch=_scratch,
        interpret=simulation(simulated),
    )
    h, last = fold(plan, fill(state, 1, LANES).reshape(batch, parts, 1, width), None, inputs, ())
    return h[:, :time, :channels], last.reshape(batch, -1)[:, :channels]


def _scratch(chunk, tile):
    return [(chunk, tile[1])]


def _decay(log_a):
    """Log-decays above 0 count as 0, see `arguments.bounded_log_decay`; of those far below exp is 0 anyhow."""
    return jnp.exp(jnp.minimum(log_a.astype(jnp.float32), 0))


def _rows(index):
    return pl.ds(pl.multiple_of(index * TOKENS, TOKENS), TOKENS)


def _scanned(decay, x, before, *, reverse=False):
    """h_t = decay_t h_{t-1} + x_t of 16 tokens, and from the last one on if `reverse`; before [1,D]."""
    row = jax.lax.broadcasted_iota(jnp.int32, decay.shape, 0)
    for shift in (1, 2, 4, 8):
        inside = row < TOKENS - shift if reverse else row >= shift
        by = -shift if reverse else shift
        x = x + jnp.where(inside, decay * roll(x, by), 0)
        decay = jnp.where(inside, decay * roll(decay, by), decay)
    return x + decay * before


def _forward(state, marks, inputs, shared, y):
    log_a, x = inputs

    def group(index, state):
        rows = _rows(index)
        h = _scanned(_decay(log_a[rows, :]), x[rows, :].astype(state.dtype), state)
        y[rows, :] = h.astype(y.dtype)
        return h[TOKENS - 1 :]

    return jax.lax.fori_loop(0, x.shape[0] // TOKENS, group, state)


def _backward(state, marks, inputs, shared, dstate, dy, dinputs, dshared, scratch):
    """What reaches token t from its state is g_t = decay_t (dh_t + g_{t+1}), a recurrence of the same kind."""
    (log_a, x), (dlog_a, dx), (before,) = inputs, dinputs, scratch
    groups = x.shape[0] // TOKENS
    row = jax.lax.broadcasted_iota(jnp.int32, (TOKENS, x.shape[1]), 0)

    def recompute(index, state):
        rows = _rows(index)
        h = _scanned(_decay(log_a[rows, :]), x[rows, :].astype(state.dtype), state)
        before[rows, :] = jnp.where(row == 0, state, roll(h, 1))
        return h[TOKENS - 1 :]

    jax.lax.fori_loop(0, groups, recompute, state)

    def group(step, dstate):
        rows = _rows(groups - 1 - step)
        decay, dh = _decay(log_a[rows, :]), dy[rows, :].astype(dstate.dtype)
        flowing = _scanned(decay, decay * dh, dstate, reverse=True)
        dx[rows, :] = (dh + jnp.where(row == TOKENS - 1, dstate, roll(flowing, -1))).astype(dx.dtype)
        change = jnp.where(log_a[rows, :] > 0, 0, flowing * before[rows, :])
        dlog_a[rows, :] = change.astype(dlog_a.dtype)
        return flowing[:1]

    return jax.lax.fori_loop(0, groups, group, dstate)


_RULE = Rule(_forward, _backward)
