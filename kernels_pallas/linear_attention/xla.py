"""Linear attention in plain JAX for any backend: matmuls within chunks, a state between them (arXiv 2312.06635).

Queries and keys of a group meet once for all its heads, and the values of these heads lie side by side, so that one
matmul per group reads or writes their states; decays per head scale values, never keys.
"""

import jax.numpy as jnp
import numpy as np

from kernels_pallas.chunks import Rule, recomputed, scan_chunks
from kernels_pallas.decay import BLOCK, channel_decays, channel_pairs, head_decays
from kernels_pallas.linear_attention import reference


def linear_attention(q, k, v, log_decay, state, documents, *, chunk_size: int | None):
    """q, k [B,T,G,K], v [B,T,H,V], log_decay None, [B,T,H] or [B,T,H,K], state [B,H,K,V] -> y as v, state."""
    time = q.shape[1]
    if time == 1:
        return reference.linear_attention(q, k, v, log_decay, state, documents)
    per_channel = log_decay is not None and log_decay.ndim == 4
    size = min(chunk_size or (32 if per_channel else 64), time)
    if per_channel:
        size = -(-size // BLOCK) * BLOCK
        return scan_chunks(_PER_CHANNEL, size, state, documents, (q, k, v, log_decay))
    return scan_chunks(_PER_HEAD, size, state, documents, (q, k, v, log_decay))


def _head_major(state, log_decay, marks, *values):
    """The values [B,C,G,...] or [B,C,H,...] as [B,G,C,...] or [B,G,R,C,...], and the decays likewise."""
    (batch, chunk, groups, _), heads = values[0].shape, state.shape[1]
    pairs, entering, leaving, whole = head_decays(log_decay, marks, chunk, state.dtype)

    def split(value):
        """[B,H,...] as [B,G,R,...]."""
        several = value.shape[1] > 1
        shape = (groups, heads // groups) if several else (1, 1)
        return value.reshape(value.shape[0], *shape, *value.shape[2:])

    values = [value.astype(state.dtype).swapaxes(1, 2) for value in values]
    values = values[:2] + [value.reshape(batch, groups, -1, *value.shape[2:]) for value in values[2:]]
    entering, leaving = (split(value.swapaxes(1, 2))[..., None] for value in (entering, leaving))
    return *values, split(state), split(pairs), entering, leaving, split(whole)[..., None, None]


def _time_major(value, like):
    """[B,G,R,C,V] as [B,C,H,V], in the dtype of another."""
    return jnp.moveaxis(value, 3, 1).reshape(like.shape).astype(like.dtype)


def _forward(state, marks, inputs, shared):
    q, k, v, log_decay = inputs
    heads = state.shape
    q, k, v, state, pairs, entering, leaving, whole = _head_major(state, log_decay, marks, q, k, v)
    q_heads, k_heads = (jnp.broadcast_to(value[:, :, None], (*v.shape[:4], q.shape[3])) for value in (q, k))
    weights = (q @ k.swapaxes(2, 3))[:, :, None] * pairs
    y = weights @ v + (entering * q_heads) @ state
    state = whole * state + (leaving * k_heads).swapaxes(3, 4) @ v
    return state.reshape(heads), _time_major(y, inputs[2])


def _backward(state, marks, inputs, shared, dstate, dy):
    q, k, v, log_decay = inputs
    chunk, heads = q.shape[1], state.shape
    q, k, v, dy, state, pairs, entering, leaving, whole = _head_major(state, log_decay, marks, q, k, v, dy)
    q_heads, k_heads = (jnp.broadcast_to(value[:, :, None], (*v.shape[:4], q.shape[3])) for value in (q, k))
    dstate = dstate.reshape(state.shape)
    weights = (q @ k.swapaxes(2, 3))[:, :, None] * pairs
    dweights = dy @ v.swapaxes(3, 4)
    dscores = jnp.sum(dweights * pairs, axis=2)
    dq_state = entering * (dy @ state.swapaxes(3, 4))
    dk_state = leaving * (v @ dstate.swapaxes(3, 4))
    dq = dscores @ k + jnp.sum(dq_state, axis=2)
    dk = dscores.swapaxes(2, 3) @ q + jnp.sum(dk_state, axis=2)
    dv = weights.swapaxes(3, 4) @ dy + (leaving * k_heads) @ dstate
    before = whole * dstate + (entering * q_heads).swapaxes(3, 4) @ dy
    dlog_decay = None
    if log_decay is not None:
        below = np.tri(chunk, k=-1, dtype=bool)
        moved = jnp.where(below, dweights * weights, 0)
        # What a decay scales: all that is read after it, of what was written before it.
        gains = jnp.sum(moved, axis=-1) - jnp.sum(moved, axis=-2) + jnp.sum(dq_state * q[:, :, None], axis=-1)
        losses = jnp.sum(dk_state * k[:, :, None], axis=-1)
        kept = jnp.sum(whole * state * dstate, axis=(3, 4))
        dlog_decay = gains @ np.tri(chunk).astype(q.dtype) + losses @ below.T.astype(q.dtype) + kept[..., None]
        dlog_decay = jnp.moveaxis(dlog_decay, 3, 1).reshape(log_decay.shape)
    dq, dk = (new.swapaxes(1, 2).astype(old.dtype) for new, old in ((dq, inputs[0]), (dk, inputs[1])))
    return before.reshape(heads), (dq, dk, _time_major(dv, inputs[2]), dlog_decay), ()


def _channel_forward(state, marks, inputs, shared):
    q, k, v, log_decay = inputs
    repeats = v.shape[2] // q.shape[2]
    q, k, v = (value.transpose(0, 2, 1, 3).astype(state.dtype) for value in (q, k, v))
    q, k = jnp.repeat(q, repeats, axis=1), jnp.repeat(k, repeats, axis=1)
    decays = channel_decays(log_decay, marks)
    weights = channel_pairs(decays, q[:, :, None], k)[:, :, 0]
    weights += jnp.sum(q * k, axis=-1)[..., None] * jnp.eye(q.shape[2], dtype=state.dtype)
    if marks is not None:
        weights = jnp.where(marks.same()[:, None], weights, 0)
    y = weights @ v + (q * decays.entering) @ state
    state = decays.whole[..., None] * state + jnp.einsum("bhjk,bhjv->bhkv", k * decays.leaving, v)
    return state, y.transpose(0, 2, 1, 3).astype(inputs[2].dtype)


_PER_HEAD = Rule(reference.prepare, _forward, _backward)
_PER_CHANNEL = recomputed(reference.prepare, _channel_forward)
