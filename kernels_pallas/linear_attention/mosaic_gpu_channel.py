"""Linear attention with a decay per channel on Hopper GPUs: scaled queries and keys, and products within chunks.

Plain JAX forms them, with anchors between any two tokens (`kernels_pallas.decay`) and no 1 / decay; the kernels of
`kernels_pallas.chunk_states` do the rest.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.chunk_states import chunk_states
from kernels_pallas.chunk_states.tiles import CHUNK
from kernels_pallas.decay import channel_decays, channel_pairs


def linear_attention(q, k, v, log_decay, state, documents, simulated):
    """Of whole chunks: q, k [B,T,G,K], v [B,T,H,V], log_decay [B,T,H,W], W <= K, state [B,H,K,V] -> y, state."""
    width = log_decay.shape[3]
    log_decay = jnp.pad(log_decay, ((0, 0), (0, 0), (0, 0), (0, q.shape[3] - width)))
    q_in, k_out, pairs, whole = jax.checkpoint(_decayed)(q, k, log_decay, documents)
    return chunk_states(q_in, k_out, pairs, v, whole, state, simulated=simulated)


def _decayed(q, k, log_decay, documents):
    """q_in, k_out, pairs and whole, see `chunk_states`. Nothing is kept for the gradient but the arguments."""
    batch, time, heads, width = log_decay.shape
    chunks, repeats = time // CHUNK, heads // q.shape[2]

    def cut(value):
        return value.reshape(batch * chunks, CHUNK, *value.shape[2:])

    def joined(value):
        """[BN,H,C,K] as bfloat16 [B,T,H,K]."""
        return value.swapaxes(1, 2).reshape(batch, time, heads, width).astype(jnp.bfloat16)

    q, k = (jnp.repeat(cut(value).swapaxes(1, 2).astype(jnp.float32), repeats, axis=1) for value in (q, k))
    decays = channel_decays(cut(log_decay), None)
    pairs = channel_pairs(decays, q[:, :, None], k)[:, :, 0]
    pairs += jnp.sum(q * k, axis=-1)[..., None] * jnp.eye(CHUNK, dtype=jnp.float32)
    pairs = pairs.reshape(batch, chunks, heads, CHUNK, CHUNK)
    entering, leaving = decays.entering, decays.leaving
    whole = decays.whole.reshape(batch, chunks, heads, width)
    if documents is not None:
        entered, left = (cut(mask.reshape(batch, time)) for mask in (documents.entered(), documents.left()))
        entering = jnp.where(entered[:, None, :, None], entering, 0)
        leaving = jnp.where(left[:, None, :, None], leaving, 0)
        whole = jnp.where(documents.survives()[:, :, None, None], whole, 0)
        pairs = jnp.where(documents.same()[:, :, None], pairs, 0)
    return joined(q * entering), joined(k * leaving), pairs.astype(jnp.bfloat16), whole
