"""Linear attention with a decay per channel on Hopper GPUs.

A kernel scales queries and keys and forms their decayed products within chunks; states go from chunk to chunk as in
`kernels_pallas.chunk_states`.
"""

import jax.numpy as jnp

from kernels_pallas.chunk_states import chunk_states
from kernels_pallas.chunk_states.channel_gpu import channel_products
from kernels_pallas.chunk_states.padding import decay_of_chunks


def linear_attention(q, k, v, log_decay, state, documents, simulated):
    """Of whole chunks: q, k [B,T,G,K], v [B,T,H,V], log_decay [B,T,H,W], W <= K, state [B,H,K,V] -> y, state."""
    log_decay = jnp.pad(log_decay, ((0, 0), (0, 0), (0, 0), (0, q.shape[3] - log_decay.shape[3])))
    products = channel_products(q, k, log_decay, documents, simulated=simulated)
    whole = decay_of_chunks(log_decay, documents)
    return chunk_states(products.q_in, products.k_out, products.reads, v, whole, state, simulated=simulated)
