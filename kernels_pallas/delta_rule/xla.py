"""The delta rule in plain JAX for any backend: one triangular system per chunk, a state between chunks.

The corrections u_i = beta_i (v_i - what the state holds under k_i just before) of a chunk solve
(I + diag(beta) A) u = beta (v - k̄ S), A being the decayed products of earlier keys (arXiv 2406.06484, 2412.06464). The
system is solved by substitution: with nearly parallel keys and beta near 2 its inverse is huge.
"""

import jax.numpy as jnp
import numpy as np

from kernels_pallas.chunks import recomputed, scan_chunks
from kernels_pallas.decay import channel_decays, channel_pairs, head_decays
from kernels_pallas.delta_rule import reference
from kernels_pallas.delta_rule.substitution import BLOCK, solve


def delta_rule(q, k, v, beta, log_decay, state, documents, *, chunk_size: int | None):
    """q, k [B,T,G,K], v [B,T,H,V], beta [B,T,H], log_decay None, [B,T,H] or [B,T,H,K], state [B,H,K,V].

    Returns y [B,T,H,V] in v's dtype and the state.
    """
    if q.shape[1] == 1:
        return reference.delta_rule(q, k, v, beta, log_decay, state, documents)
    per_channel = log_decay is not None and log_decay.ndim == 4
    rule = _PER_CHANNEL if per_channel else _PER_HEAD
    size = min(chunk_size or (32 if per_channel else 64), q.shape[1])
    size = -(-size // BLOCK) * BLOCK
    return scan_chunks(rule, size, state, documents, (q, k, v, beta, log_decay))


def _head_major(state, inputs):
    """q, k [B,G,C,K], v [B,H,C,V] and beta [B,H,C], in the dtype of the state."""
    q, k, v, beta = inputs[:4]
    return (*(value.swapaxes(1, 2).astype(state.dtype) for value in (q, k, v, beta)),)


def _per_head(state, marks, inputs, shared):
    q, k, v, beta = _head_major(state, inputs)
    chunk, repeats = q.shape[2], v.shape[1] // q.shape[1]
    decays = head_decays(inputs[4], marks, chunk, state.dtype)
    entering, leaving = (value.swapaxes(1, 2)[..., None] for value in (decays.entering, decays.leaving))
    reads = jnp.repeat(jnp.einsum("bgik,bgjk->bgij", q, k), repeats, axis=1) * decays.pairs
    overlaps = jnp.repeat(jnp.einsum("bgik,bgjk->bgij", k, k), repeats, axis=1) * decays.pairs
    q, k = jnp.repeat(q, repeats, axis=1), jnp.repeat(k, repeats, axis=1)
    state, y = _advance(
        state, v, beta, reads, overlaps, q * entering, k * entering, k * leaving, decays.whole[..., None]
    )
    return state, y.swapaxes(1, 2).astype(inputs[2].dtype)


def _per_channel(state, marks, inputs, shared):
    q, k, v, beta = _head_major(state, inputs)
    repeats = v.shape[1] // q.shape[1]
    q, k = jnp.repeat(q, repeats, axis=1), jnp.repeat(k, repeats, axis=1)
    decays = channel_decays(inputs[4], marks)
    reads, overlaps = jnp.moveaxis(channel_pairs(decays, jnp.stack([q, k], axis=2), k), 2, 0)
    reads += jnp.sum(q * k, axis=-1)[..., None] * jnp.eye(q.shape[2], dtype=state.dtype)
    if marks is not None:
        reads, overlaps = (jnp.where(marks.same()[:, None], value, 0) for value in (reads, overlaps))
    entering, leaving = decays.entering, decays.leaving
    state, y = _advance(state, v, beta, reads, overlaps, q * entering, k * entering, k * leaving, decays.whole)
    return state, y.swapaxes(1, 2).astype(inputs[2].dtype)


def _advance(state, v, beta, reads, overlaps, q_in, k_in, k_out, whole):
    """The state after a chunk and y [B,H,C,V], from the decayed products and keys; whole [B,H,1 or K]."""
    below = np.tri(v.shape[2], k=-1, dtype=bool)
    system = jnp.where(below, beta[..., None] * overlaps, 0)
    wanted = beta[..., None] * (v - k_in @ state)
    changes = solve(system, wanted)
    y = q_in @ state + reads @ changes
    return whole[..., None] * state + jnp.einsum("bhjk,bhjv->bhkv", k_out, changes), y


_PER_HEAD = recomputed(reference.prepare, _per_head)
_PER_CHANNEL = recomputed(reference.prepare, _per_channel)
