"""Decays per head within chunks and over them, as the kernels over chunks take them."""

import jax
import jax.numpy as jnp

from kernels_pallas.chunk_states.padding import Chunked
from kernels_pallas.chunk_states.tiles import CHUNK


def head_decays(log_decay: jax.Array | None, v: jax.Array, documents: Chunked | None):
    """Of each chunk, float32: log2 of the decay up to each token, the decays from the state in front to each token and
    from each token to the state after, all [B,H,N,C], and from state to state [B,N,H].

    log_decay is None or float32 [B,T,H], v [B,T,H,...] gives the shapes; T is a multiple of C.
    """
    batch, time, heads = v.shape[:3]
    shape = (batch, heads, time // CHUNK, CHUNK)
    if log_decay is None:
        sums = jnp.zeros(shape, jnp.float32)
    else:
        steps = log_decay.swapaxes(1, 2).reshape(shape)
        sums = jnp.cumsum(steps * jnp.log2(jnp.e).astype(jnp.float32), axis=3)
    entering, leaving = jnp.exp2(sums), jnp.exp2(sums[..., -1:] - sums)
    whole = entering[..., -1]
    if documents is not None:
        entering = jnp.where(documents.entered()[:, None], entering, 0)
        leaving = jnp.where(documents.left()[:, None], leaving, 0)
        whole = jnp.where(documents.survives()[:, None], whole, 0)
    return sums, entering, leaving, whole.swapaxes(1, 2)
