"""Attention in plain JAX for any backend."""

import jax
import jax.numpy as jnp

from kernels_pallas.attention.visibility import Visibility

_MASKED = -1e30


def attention(q, k, v, sinks, bias, visibility: Visibility, *, scale: float, softcap: float | None) -> jax.Array:
    """q [B,T,H,K], k [B,S,G,K], v [B,S,G,V], sinks [H] or None, bias [1|B,1|H,T,S] or None -> [B,T,H,V] in q's dtype."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    (batch, time, heads, width), (groups, value_width) = q.shape, v.shape[2:]
    grouped = q.reshape(batch, time, groups, heads // groups, width)
    logits = scale * jnp.einsum("btgrk,bsgk->bgrts", grouped, k, preferred_element_type=dtype)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        shared = bias.astype(dtype)
        logits += shared[:, None] if bias.shape[1] == 1 else shared.reshape(-1, groups, heads // groups, *bias.shape[2:])
    mask = visibility.mask()
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, _MASKED)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    sink = None if sinks is None else sinks.astype(dtype).reshape(groups, -1, 1, 1)
    if sink is not None:
        largest = jnp.maximum(largest, sink)
    largest = jax.lax.stop_gradient(largest)
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sink is not None:
        total += jnp.exp(sink - largest)
    probabilities = weights / total
    if mask is not None:
        probabilities = jnp.where(jnp.any(mask, axis=-1, keepdims=True)[:, None, None], probabilities, 0)
    y = jnp.einsum("bgrts,bsgv->btgrv", probabilities.astype(v.dtype), v, preferred_element_type=dtype)
    return y.reshape(batch, time, heads, value_width).astype(q.dtype)
