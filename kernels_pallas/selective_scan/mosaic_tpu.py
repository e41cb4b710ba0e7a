"""The selective scan on TPUs: channels along lanes, the state of a channel down its lane, tokens in turn.

B and C of a token are needed as columns that fill all lanes: a matmul with ones and zeros, exact, makes those of 16
tokens at once.
"""

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
    simulation,
)
from kernels_pallas.selective_scan import reference

_SUBLANES = 8


def obstacles(u, dt, A, B, C, D) -> list[str]:
    """What the kernel cannot honour."""
    values = {"u": u, "dt": dt, "A": A, "B": B, "C": C, "D": D}
    states = [f"{A.shape[1]} states per channel (at most 128)"] if A.shape[1] > LANES else []
    return unfit(values, "float32", "bfloat16") + states


CHOICES = {"chunk": (32, 64, 128), "channels": (128, 256, 512)}
"""Block sizes that tuning tries."""


def heuristic(u, dt, A, B, C, D) -> dict[str, int]:
    """A state of eight tiles (512 channels of 16), and as many tokens as their states fit in four megabytes."""
    states = max(_SUBLANES, A.shape[1])
    channels = max(LANES, 512 * 16 // states // LANES * LANES)
    return {"chunk": max(TOKENS, min(128, (1 << 20) // (states * channels))), "channels": channels}


def selective_scan(u, dt, A, B, C, D, state, documents, *, blocks, simulated):
    """u, dt [B,T,D], A [D,N], B, C [B,T,N], D [D] or None, state [B,D,N] -> y [B,T,D] in u's dtype, state [B,D,N]."""
    (batch, time, channels), states = u.shape, A.shape[1]
    chunk = chunk_size(blocks["chunk"], time)
    u, dt, B, C = reference.prepare(documents, (u, dt, B, C), state.dtype)
    u, dt = (fill(fill(value, 1, chunk), 2, LANES) for value in (u, dt))
    B, C = (fill(fill(value, 1, chunk), 2, _SUBLANES) for value in (B, C))
    width = channel_block(u.shape[2], blocks["channels"])
    parts, rows = u.shape[2] // width, B.shape[2]
    D = jnp.zeros(channels, state.dtype) if D is None else D.astype(state.dtype)
    A = fill(fill(A.astype(state.dtype), 0, LANES), 1, _SUBLANES).reshape(parts, width, rows).swapaxes(1, 2)
    D = fill(D, 0, LANES).reshape(parts, 1, width)
    state = fill(fill(state, 1, LANES), 2, _SUBLANES).reshape(batch, parts, width, rows).swapaxes(2, 3)
    layout, columns = Tokens(width, parts), Tokens(rows, turned=True)
    kept = None
    if documents is not None:
        kept = jnp.where(fill(documents.starts(), 1, chunk), 0.0, 1.0).reshape(batch, 1, -1, 1, chunk)
    plan = Plan(
        "selective_scan",
        _RULE,
        chunk,
        (layout, layout, columns, columns),
        layout,
        u.dtype,
        marks=None if kept is None else Tokens(1, across=True, scalars=True),
        scratch=_scratch,
        interpret=simulation(simulated),
    )
    y, last = fold(plan, state, kept, (u, dt, B, C), (A, D))
    last = last.swapaxes(2, 3).reshape(batch, -1, rows)
    return y[:, :time, :channels], last[:, :channels, :states]


def _scratch(chunk, tile):
    return [(chunk, *tile)]


def _group(index, width, *values):
    """Of 16 tokens: where they are, rows of those values that have one lane per channel, columns of the others."""
    rows = pl.ds(pl.multiple_of(index * TOKENS, TOKENS), TOKENS)
    shape = TOKENS, TOKENS * LANES
    token, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    own = jnp.where(jax.lax.div(lane, LANES) == token, 1.0, 0.0)

    def columns(value):
        spread = jax.lax.dot_general(
            value, own, (((0,), (0,)), ((), ())), precision="highest", preferred_element_type=jnp.float32
        )
        tiles = [spread[:, i * LANES : (i + 1) * LANES] for i in range(TOKENS)]
        return [jnp.concatenate([tile] * (width // LANES), axis=1) for tile in tiles]

    loaded = (value[rows, :].astype(jnp.float32) for value in values)
    return rows, *(value if value.shape[1] == width else columns(value) for value in loaded)


def _kept(state, marks, token):
    """The state, zero where a document starts."""
    return state if marks is None else state * marks[0, token]


def _forward(state, marks, inputs, shared, y):
    A, skip = (ref[...] for ref in shared)
    width = A.shape[1]

    def group(index, state):
        rows, u, dt, B, C = _group(index, width, *inputs)
        x, outputs = dt * u, []
        for i in range(TOKENS):
            state = _kept(state, marks, index * TOKENS + i)
            state = jnp.exp(dt[i : i + 1] * A) * state + x[i : i + 1] * B[i]
            outputs.append(jnp.sum(state * C[i], axis=0, keepdims=True))
        y[rows, :] = (jnp.concatenate(outputs, axis=0) + skip * u).astype(y.dtype)
        return state

    return jax.lax.fori_loop(0, y.shape[0] // TOKENS, group, state)


def _backward(state, marks, inputs, shared, dstate, dy, dinputs, dshared, scratch):
    (A, skip), (before,), (dA, dskip) = (ref[...] for ref in shared), scratch, dshared
    (u_in, dt_in, B_in, C_in), (du, ddt, dB, dC) = inputs, dinputs
    width, groups = A.shape[1], dy.shape[0] // TOKENS
    lane = jax.lax.broadcasted_iota(jnp.int32, dC.shape, 1)

    def put(columns, token, value):
        """The sum of a value over its lanes, in the column of a token."""
        return jnp.where(lane == token, jnp.sum(value, axis=1, keepdims=True), columns)

    def recompute(index, carry):
        state, columns = carry
        _, u, dt, B, dh = _group(index, width, u_in, dt_in, B_in, dy)
        x = dt * u
        for i in range(TOKENS):
            token = index * TOKENS + i
            before[token] = state
            state = jnp.exp(dt[i : i + 1] * A) * _kept(state, marks, token) + x[i : i + 1] * B[i]
            columns = put(columns, token, state * dh[i : i + 1])
        return state, columns

    none = jnp.zeros(dC.shape, jnp.float32)
    dC[...] = jax.lax.fori_loop(0, groups, recompute, (state, none))[1]

    def group(step, carry):
        dstate, total, columns = carry
        index = groups - 1 - step
        rows, u, dt, B, C, dh = _group(index, width, u_in, dt_in, B_in, C_in, dy)
        x, dxs, drates = dt * u, [], []
        for i in reversed(range(TOKENS)):
            token = index * TOKENS + i
            dstate = dstate + C[i] * dh[i : i + 1]
            dxs.append(jnp.sum(dstate * B[i], axis=0, keepdims=True))
            columns = put(columns, token, dstate * x[i : i + 1])
            dstate = _kept(dstate * jnp.exp(dt[i : i + 1] * A), marks, token)
            ddecay = dstate * before[token]
            drates.append(jnp.sum(ddecay * A, axis=0, keepdims=True))
            total = total + ddecay * dt[i : i + 1]
        dx, drate = (jnp.concatenate(values[::-1], axis=0) for values in (dxs, drates))
        du[rows, :] = (dt * dx + skip * dh).astype(du.dtype)
        ddt[rows, :] = (u * dx + drate).astype(ddt.dtype)
        dskip[...] += jnp.sum(u * dh, axis=0, keepdims=True)
        return dstate, total, columns

    dstate, total, columns = jax.lax.fori_loop(0, groups, group, (dstate, jnp.zeros_like(A), none))
    dB[...] = columns
    dA[...] += total
    return dstate


_RULE = Rule(_forward, _backward)
