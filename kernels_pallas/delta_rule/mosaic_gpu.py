"""The delta rule on Hopper GPUs: the corrections of all chunks at once, then the states chunk by chunk.

With u_i = beta_i (v_i - what the state holds under k_i), the chunk's u solve (I + diag(beta) A) u = beta (v - k̄ S), so
u = U - W S with W and U from the triangular inverse alone (arXiv 2406.06484, 2412.06464). Three kinds of work:

    A and the decayed q kᵀ              a kernel, all chunks       (mosaic_gpu_pairs, chunk_states.channel_gpu)
    inverse, W and U                    kernels, all chunks        (mosaic_gpu_inverse, mosaic_gpu_corrections)
    u = U - W S, y, the next state      a kernel, chunk by chunk   (kernels_pallas.chunk_states)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.chunk_states import chunk_states
from kernels_pallas.chunk_states.channel_gpu import channel_products
from kernels_pallas.chunk_states.decays import head_decays
from kernels_pallas.chunk_states.padding import Chunked, decay_of_chunks, filled, widened
from kernels_pallas.chunk_states.tiles import CHUNK
from kernels_pallas.delta_rule import reference
from kernels_pallas.delta_rule.mosaic_gpu_corrections import corrections
from kernels_pallas.delta_rule.mosaic_gpu_pairs import decayed_pairs
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


CHOICES = {"chunk": (64,)}
"""Block sizes that tuning tries."""


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
    chunked = None if documents is None else Chunked.of(documents)
    if log_decay is not None and log_decay.ndim == 4:
        decayed = _per_channel(chunked, q, k, beta, log_decay, simulated)
    else:
        decayed = _per_head(chunked, q, k, v, beta, log_decay, simulated)
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


# Gradients of q and k come from several products, each in bfloat16; they meet in float32.


def _per_head(documents, q, k, v, beta, log_decay, simulated):
    """For log_decay float32 [B,T,H] or None."""
    q, k = q.astype(_F32), k.astype(_F32)
    sums, entering, leaving, whole = head_decays(log_decay, v, documents)
    beta = beta.astype(_F32).swapaxes(1, 2).reshape(sums.shape)
    numbers = None if documents is None else documents.number
    k_in = k.astype(_BF16)
    reads, upper = decayed_pairs(sums, beta, q.astype(_BF16), k_in, numbers, simulated)

    def times(value, decay):
        decay = decay.reshape(*decay.shape[:2], -1).swapaxes(1, 2)
        return (jnp.repeat(value, v.shape[2] // value.shape[2], axis=2) * decay[..., None]).astype(_BF16)

    key_scale, beta = (value.swapaxes(1, 2) for value in (beta * entering, beta))
    whole = jnp.broadcast_to(whole[..., None], (*whole.shape, k.shape[3]))
    return _Decayed(times(q, entering), k_in, times(k, leaving), reads, upper, key_scale, beta, whole)


def _per_channel(documents, q, k, beta, log_decay, simulated):
    """For log_decay float32 [B,T,H,K]."""
    q, k = (value.astype(_F32) for value in (q, k))
    products = functools.partial(
        channel_products, k=k.astype(_BF16), log_decay=log_decay, documents=documents, simulated=simulated
    )
    reads, keys = products(q.astype(_BF16)), products(k.astype(_BF16), dtype=_F32)
    beta = beta.astype(_F32).reshape(beta.shape[0], -1, CHUNK, beta.shape[2]).swapaxes(2, 3)
    upper = (keys.reads * beta[..., None]).swapaxes(3, 4)
    whole = decay_of_chunks(log_decay, documents)
    return _Decayed(reads.q_in, keys.q_in, reads.k_out, reads.reads, upper, beta, beta, whole)
