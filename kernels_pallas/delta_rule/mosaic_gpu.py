"""The delta rule on Hopper GPUs: the corrections of all chunks at once, then the states chunk by chunk.

With u_i = beta_i (v_i - what the state holds under k_i), the chunk's u solve (I + diag(beta) A) u = beta (v - k̄ S), so
u = U - W S with W and U from the triangular inverse alone (arXiv 2406.06484, 2412.06464). Three kinds of work:

    decays, A and the decayed q kᵀ      plain JAX, all chunks      (kernels_pallas.decay)
    inverse, W and U                    kernels, all chunks        (mosaic_gpu_inverse, mosaic_gpu_corrections)
    u = U - W S, y, the next state      a kernel, chunk by chunk   (kernels_pallas.chunk_states)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.chunk_states import chunk_states
from kernels_pallas.chunk_states.padding import Chunked, filled, widened
from kernels_pallas.chunk_states.tiles import CHUNK
from kernels_pallas.decay import channel_decays, channel_pairs, head_decays
from kernels_pallas.delta_rule import reference
from kernels_pallas.delta_rule.mosaic_gpu_corrections import corrections
from kernels_pallas.dispatch import unfit

WIDEST = {
    "key": 128,
    "value": 256,
}  # the keys by which states are read to be corrected share a block's memory with them
_F32, _BF16 = jnp.float32, jnp.bfloat16


def obstacles(q, k, v, beta, log_decay) -> list[str]:
    """What the kernels cannot honour of these inputs, in words."""
    reasons = unfit({"q": q, "k": k, "v": v}, "bfloat16")
    reasons += unfit({"beta": beta, "log_decay": log_decay}, "float32", "bfloat16")
    widths = {"key": k.shape[3], "value": v.shape[3]}
    return reasons + [f"a {n} width of {w} above {WIDEST[n]}" for n, w in widths.items() if w > WIDEST[n]]


def heuristic(q, k, v, beta, log_decay) -> dict[str, int]:
    """Chunks of 64: one tile of the tensor cores, and the largest system that fits four to a block of threads."""
    return {"chunk": CHUNK}


def delta_rule(q, k, v, beta, log_decay, state, documents, *, blocks, simulated):
    """q, k [B,T,G,K], v [B,T,H,V], beta [B,T,H], log_decay None, [B,T,H] or [B,T,H,K], state [B,H,K,V].

    Returns y [B,T,H,V] in v's dtype and the state. Chunks are of 64 tokens, whatever `blocks` says.
    """
    q, k, v, beta, log_decay = reference.prepare(documents, (q, k, v, beta, log_decay), _F32)
    time, keys, values = q.shape[1], q.shape[3], v.shape[3]
    q, k, v, state = widened(q, k, v, state)
    if log_decay is not None and log_decay.ndim == 4:
        log_decay = widened(log_decay, log_decay, v, state)[0]
    q, k, v, beta, log_decay = (filled(value) for value in (q, k, v, beta, log_decay))
    # The backward pass makes products and decays again; it keeps what the kernels take, and the inverses.
    decayed = jax.checkpoint(_decays)(documents, q, k, beta, log_decay)
    w, u = corrections(decayed.upper, decayed.key_scale, decayed.beta, decayed.k_in, v, simulated)
    y, state = chunk_states(decayed.q_in, decayed.k_out, decayed.reads, u, decayed.whole, state, w, simulated=simulated)
    return y[:, :time, :, :values], state[:, :, :keys, :values]


class _Decayed(NamedTuple):
    """What decays do to the chunks of a call, N of them per row."""

    q_in: jax.Array  # bfloat16 [B, T, H, K]: queries from the start of the chunk
    k_in: jax.Array  # bfloat16 [B, T, G or H, K]: keys from the start of the chunk, but for what is in key_scale
    k_out: jax.Array  # bfloat16 [B, T, H, K]: keys to the end of the chunk
    reads: jax.Array  # bfloat16 [B, N, H, 64, 64]: q kᵀ
    upper: jax.Array  # float32 [B, N, H, 64, 64]: diag(beta) A, transposed
    key_scale: jax.Array  # float32 [B, N, H, 64]: beta, and the decay from the start of the chunk if it is per head
    beta: jax.Array  # float32 [B, N, H, 64]
    whole: jax.Array  # float32 [B, N, H, K]


def _decays(documents, q, k, beta, log_decay):
    (batch, time, heads), repeats = beta.shape, beta.shape[2] // k.shape[2]
    # Gradients of q and k come from several products, each in bfloat16; they meet in float32.
    q, k = (value.astype(_F32).reshape(-1, CHUNK, *value.shape[2:]) for value in (q, k))
    beta = beta.astype(_F32).reshape(-1, CHUNK, heads).swapaxes(1, 2)
    if log_decay is not None:
        log_decay = log_decay.reshape(-1, CHUNK, *log_decay.shape[2:])
    marks = None if documents is None else jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), Chunked.of(documents))
    of_chunks = _per_channel if log_decay is not None and log_decay.ndim == 4 else _per_head
    q_in, k_in, k_out, reads, overlaps, entering, whole = of_chunks(q, k, log_decay, marks, repeats)
    upper = jnp.where(np.tri(CHUNK, k=-1, dtype=bool).T, overlaps * beta[:, :, None], 0)
    q_in, k_in, k_out = (value.reshape(batch, time, -1, k.shape[3]).astype(_BF16) for value in (q_in, k_in, k_out))
    rest = (reads.astype(_BF16), upper, beta * entering, beta, jnp.broadcast_to(whole, (*beta.shape[:2], k.shape[3])))
    return _Decayed(q_in, k_in, k_out, *(value.reshape(batch, -1, *value.shape[1:]) for value in rest))


# Both take q, k [M,64,G,K] of M chunks, float32 that bfloat16 can hold, and give q_in, k_in, k_out, the decayed q kᵀ,
# the decayed k kᵀ transposed, both [M,H,64,64], what k_in lacks (or 1), and the whole decay [M or 1,H or 1,K or 1].


def _per_head(q, k, log_decay, marks, repeats):
    """For a log-decay per head [M,64,H], or None."""
    decays = head_decays(log_decay, marks, CHUNK, _F32)
    products = functools.partial(jnp.einsum, "migk,mjgk->mgij", preferred_element_type=_F32)
    q16, k16 = q.astype(_BF16), k.astype(_BF16)
    reads = jnp.repeat(products(q16, k16), repeats, axis=1) * decays.pairs
    overlaps = jnp.repeat(products(k16, k16), repeats, axis=1) * decays.pairs.swapaxes(2, 3)
    q_in, k_out = (
        jnp.repeat(value, repeats, axis=2) * decay[..., None]
        for value, decay in ((q, decays.entering), (k, decays.leaving))
    )
    return q_in, k, k_out, reads, overlaps, decays.entering.swapaxes(1, 2), decays.whole[..., None]


def _per_channel(q, k, log_decay, marks, repeats):
    """For a log-decay per channel [M,64,H,K]."""
    q, k = (jnp.repeat(value, repeats, axis=2).swapaxes(1, 2) for value in (q, k))
    decays = channel_decays(log_decay, marks)
    reads, overlaps = jnp.moveaxis(channel_pairs(decays, jnp.stack([q, k], axis=2), k), 2, 0)
    reads += jnp.sum(q * k, axis=-1)[..., None] * jnp.eye(CHUNK, dtype=_F32)
    if marks is not None:
        reads, overlaps = (jnp.where(marks.same()[:, None], value, 0) for value in (reads, overlaps))
    entering, leaving = decays.entering, decays.leaving
    q_in, k_in, k_out = (value.swapaxes(1, 2) for value in (q * entering, k * entering, k * leaving))
    return q_in, k_in, k_out, reads, overlaps.swapaxes(2, 3), 1, decays.whole
