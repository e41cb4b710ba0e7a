"""The short convolution on TPUs: channels along lanes, the inputs before a chunk as its state.

Padding inside of a row is moved to its end before, so that taps count live tokens; how many of the tokens before it a
token may see is counted before, too.
"""

import jax.numpy as jnp

from kernels_pallas.decay_tpu import column
from kernels_pallas.dispatch import unfit
from kernels_pallas.fold_tpu import (
    LANES,
    TOKENS,
    Plan,
    Tokens,
    channel_block,
    chunk_size,
    fill,
    filled,
    fold,
    on_values,
    roll,
    simulation,
)
from kernels_pallas.segments import silence
from kernels_pallas.short_convolution import xla


def obstacles(x, w, bias) -> list[str]:
    """What the kernel cannot honour."""
    many = [f"{w.shape[0]} taps (at most {LANES})"] if w.shape[0] > LANES else []
    return unfit({"x": x, "w": w, "bias": bias}, "float32", "bfloat16") + many


CHOICES = {"chunk": (128, 256, 512), "channels": (128, 256, 512)}
"""Block sizes that tuning tries."""


def heuristic(x, w, bias) -> dict[str, int]:
    """256 tokens of 512 channels: every tap is one more pass over half a megabyte in VMEM."""
    return {"chunk": 256, "channels": 512}


def short_convolution(x, w, bias, state, documents, *, blocks, simulated):
    """x [B,T,D], w [W,D], bias [D] or None, state [B,W-1,D], documents or None -> y [B,T,D] in x's dtype, state."""
    (batch, time, channels), taps, dtype = x.shape, w.shape[0], state.dtype
    rows = filled(max(taps - 1, 1), 8)
    chunk = max(chunk_size(blocks["chunk"], time), filled(rows, TOKENS))
    x, number, back = xla.in_order(silence(documents, x), documents)
    last = xla.last_inputs(x, state, number, documents)
    reach = None if number is None else fill(xla.reach(number, taps), 1, chunk).reshape(batch, 1, -1, 1, chunk)
    filled_x = fill(fill(x, 1, chunk), 2, LANES)
    width = channel_block(filled_x.shape[2], blocks["channels"])
    parts = filled_x.shape[2] // width
    bias = jnp.zeros(channels, dtype) if bias is None else bias.astype(dtype)
    shared = tuple(
        fill(value, 1, LANES).reshape(-1, parts, width).swapaxes(0, 1) for value in (w.astype(dtype), bias[None])
    )
    state = jnp.pad(fill(state, 2, LANES), ((0, 0), (rows - taps + 1, 0), (0, 0)))
    state = state.reshape(batch, rows, parts, width).swapaxes(1, 2)
    layout = Tokens(width, parts)
    plan = Plan(
        "short_convolution",
        _RULE,
        chunk,
        (layout,),
        layout,
        x.dtype,
        marks=None if reach is None else Tokens(1, across=True),
        interpret=simulation(simulated),
    )
    y, _ = fold(plan, state, reach, (filled_x,), shared)
    return back(y[:, :time, :channels]), last


def _shifts(marks, taps):
    """For every tap but the last: how far back it reaches, and which tokens may see that far [C, 1]."""
    reach = None if marks is None else column(marks)
    return [(taps - 1 - tap, None if reach is None else reach >= taps - 1 - tap) for tap in range(taps - 1)]


def _masked(value, seen):
    return value if seen is None else jnp.where(seen, value, 0)


def _forward(state, marks, inputs, shared):
    x, (w, bias), rows = inputs[0].astype(state.dtype), shared, state.shape[0]
    line = jnp.concatenate([state, x], axis=0)
    y = bias + w[-1:] * x
    for tap, (by, seen) in enumerate(_shifts(marks, w.shape[0])):
        y = y + w[tap : tap + 1] * _masked(roll(line, by)[rows:], seen)
    return line[x.shape[0] :], y


def _backward(state, marks, inputs, shared, dstate, dy):
    x, (w, _), rows = inputs[0].astype(state.dtype), shared, state.shape[0]
    line, dy, dtaps = jnp.concatenate([state, x], axis=0), dy.astype(state.dtype), []
    above = jnp.zeros_like(state)
    dline = jnp.concatenate([above, w[-1:] * dy], axis=0)
    dline = dline + jnp.concatenate([jnp.zeros_like(x), dstate], axis=0)
    for tap, (by, seen) in enumerate(_shifts(marks, w.shape[0])):
        masked = _masked(dy, seen)
        dtaps.append(jnp.sum(masked * roll(line, by)[rows:], axis=0, keepdims=True))
        dline = dline + roll(jnp.concatenate([above, w[tap : tap + 1] * masked], axis=0), -by)
    dtaps.append(jnp.sum(dy * x, axis=0, keepdims=True))
    dtaps = jnp.concatenate(dtaps, axis=0) if len(dtaps) > 1 else dtaps[0]
    return dline[:rows], (dline[rows:],), (dtaps, jnp.sum(dy, axis=0, keepdims=True))


_RULE = on_values(_forward, _backward)
