"""Linear attention in plain JAX for any backend: matmuls within chunks, a state between them (arXiv 2312.06635).

Queries and keys of a group meet once for all its heads, and the values of these heads lie side by side, so that one
matmul per group reads or writes their states; decays per head scale values, never keys.
"""

import jax.numpy as jnp
import numpy as np

from kernels_pallas.chunks import Rule, recomputed, scan_chunks
from kernels_pallas.decay import BLOCK, channel_decays, channel_pairs, head_decays
from kernels_pallas.linear_attention import reference


def linear_attention(q, k, v, log_decay, state, document, *, chunk_size: int | None):
    """q, k [B,T,G,K], v [B,T,H,V], log_decay None, [B,T,H] or [B,T,H,K], state [B,H,K,V] -> y as v, state."""
    (batch, time, groups, width), (heads, value_width) = q.shape, v.shape[2:]
    repeats = heads // groups
    if time == 1:
        return reference.linear_attention(q, k, v, log_decay, state, document)
    size = min(chunk_size or 64, time)
    if log_decay is not None and log_decay.ndim == 4:
        size = -(-size // BLOCK) * BLOCK
        return scan_chunks(_PER_CHANNEL, size, state, document, (q, k, v, log_decay))
    state = state.reshape(batch, groups, repeats, width, value_width).swapaxes(2, 3)
    v = v.reshape(batch, time, groups, repeats, value_width)
    y, state = scan_chunks(_PER_HEAD, size, state, document, (q, k, v, log_decay))
    state = state.swapaxes(2, 3).reshape(batch, heads, width, value_width)
    return y.reshape(batch, time, heads, value_width), state


def _grouped(decays, groups):
    """The decays with their heads [H] split in [G, R], each laid out like what it multiplies."""
    pairs, entering, leaving, whole = decays

    def split(value, axis):
        heads = value.shape[axis]
        shape = (1, 1) if heads == 1 and groups > 1 else (groups, heads // groups)
        return value.reshape(*value.shape[:axis], *shape, *value.shape[axis + 1 :])

    return split(pairs, 1), split(entering, 2)[..., None], split(leaving, 2)[..., None], split(whole, 1)


def _forward(state, marks, inputs, shared):
    q, k, v = (value.astype(state.dtype) for value in inputs[:3])
    decays = head_decays(inputs[3], marks, q.shape[1], state.dtype)
    pairs, entering, leaving, whole = _grouped(decays, q.shape[2])
    weights = jnp.einsum("bigk,bjgk->bgij", q, k)[:, :, None] * pairs
    y = jnp.einsum("bgrij,bjgrv->bigrv", weights, v) + entering * jnp.einsum("bigk,bgkrv->bigrv", q, state)
    state = whole[:, :, None, :, None] * state + jnp.einsum("bjgk,bjgrv->bgkrv", k, leaving * v)
    return state, y.astype(inputs[2].dtype)


def _backward(state, marks, inputs, shared, dstate, dy):
    q, k, v, dy = (value.astype(state.dtype) for value in (*inputs[:3], dy))
    chunk = q.shape[1]
    decays = head_decays(inputs[3], marks, chunk, state.dtype)
    pairs, entering, leaving, whole = _grouped(decays, q.shape[2])
    weights = jnp.einsum("bigk,bjgk->bgij", q, k)[:, :, None] * pairs
    dweights = jnp.einsum("bigrv,bjgrv->bgrij", dy, v)
    dscores = jnp.sum(dweights * pairs, axis=2)
    dy_state, v_state = entering * dy, leaving * v
    dq = jnp.einsum("bgij,bjgk->bigk", dscores, k) + jnp.einsum("bigrv,bgkrv->bigk", dy_state, state)
    dk = jnp.einsum("bgij,bigk->bjgk", dscores, q) + jnp.einsum("bjgrv,bgkrv->bjgk", v_state, dstate)
    dv_state = leaving * jnp.einsum("bjgk,bgkrv->bjgrv", k, dstate)
    dv = jnp.einsum("bgrij,bigrv->bjgrv", weights, dy) + dv_state
    before = whole[:, :, None, :, None] * dstate + jnp.einsum("bigk,bigrv->bgkrv", q, dy_state)
    dlog_decay = None
    if inputs[3] is not None:
        below = jnp.asarray(np.tri(chunk, k=-1, dtype=bool))
        moved = jnp.where(below, dweights * weights, 0)
        gains = jnp.sum(moved, axis=-1) - jnp.sum(moved, axis=-2)
        gains = jnp.moveaxis(gains, 3, 1) + jnp.sum(dy_state * jnp.einsum("bigk,bgkrv->bigrv", q, state), axis=-1)
        kept = whole * jnp.einsum("bgkrv,bgkrv->bgr", state, dstate)
        upto = jnp.asarray(np.tri(chunk), state.dtype)
        dlog_decay = jnp.einsum("ji,bjgr->bigr", upto, gains) + kept[:, None]
        dlog_decay += jnp.einsum(
            "ij,bjgr->bigr", upto - jnp.eye(chunk, dtype=upto.dtype), jnp.sum(dv_state * v, axis=-1)
        )
        dlog_decay = dlog_decay.reshape(inputs[3].shape)
    gradients = tuple(new.astype(old.dtype) for new, old in zip((dq, dk, dv), inputs[:3], strict=True))
    return before, (*gradients, dlog_decay), ()


def _channel_forward(state, marks, inputs, shared):
    q, k, v, log_decay = inputs
    repeats = v.shape[2] // q.shape[2]
    q, k, v = (value.transpose(0, 2, 1, 3).astype(state.dtype) for value in (q, k, v))
    q, k = jnp.repeat(q, repeats, axis=1), jnp.repeat(k, repeats, axis=1)
    decays = channel_decays(log_decay)
    weights = channel_pairs(decays, q[:, :, None], k)[:, :, 0]
    weights += jnp.sum(q * k, axis=-1)[..., None] * jnp.eye(q.shape[2], dtype=state.dtype)
    entering, leaving, whole = decays.entering, decays.leaving, decays.whole
    if marks is not None:
        weights = jnp.where(marks.same()[:, None], weights, 0)
        entering = jnp.where(marks.entered()[:, None, :, None], entering, 0)
        leaving = jnp.where(marks.left()[:, None, :, None], leaving, 0)
        whole = jnp.where(marks.survives()[:, None, None], whole, 0)
    y = weights @ v + (q * entering) @ state
    state = whole[..., None] * state + jnp.einsum("bhjk,bhjv->bhkv", k * leaving, v)
    return state, y.transpose(0, 2, 1, 3).astype(inputs[2].dtype)


_PER_HEAD = Rule(_forward, _backward)
_PER_CHANNEL = recomputed(_channel_forward)
