"""The definition: a masked softmax over all logits at once, in float32 (float64 for float64 inputs)."""

import jax
import jax.numpy as jnp

from kernels_pallas.attention.visibility import Visibility

NOTHING = -1e20
"""The logsumexp of nothing: finite, so that differences are, and below whatever a logit can be."""


def attention(q, k, v, sinks, bias, visibility: Visibility, *, scale: float, softcap: float | None):
    """q [B,T,H,K], k [B,S,G,K], v [B,S,G,V], sinks [H] or None, bias [1|B,1|H,T,S] or None.

    Returns:
        [B,T,H,V] in q's dtype, and the logsumexps [B,T,H] in float32 (float64), `NOTHING` where a query sees nothing.
    """
    weights, lse = probabilities(q, k, sinks, bias, visibility, scale=scale, softcap=softcap)
    with jax.default_matmul_precision("highest"):
        values = jnp.repeat(v.astype(weights.dtype), q.shape[2] // k.shape[2], axis=2)
        return jnp.einsum("bhts,bshv->bthv", weights, values).astype(q.dtype), lse.swapaxes(1, 2)


def probabilities(q, k, sinks, bias, visibility: Visibility, *, scale: float, softcap: float | None):
    """Weights of every key for every query [B,H,T,S], logsumexps [B,H,T]; float32 (float64); arguments as above."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    keys = jnp.repeat(k.astype(dtype), q.shape[2] // k.shape[2], axis=2)
    with jax.default_matmul_precision("highest"):
        logits = scale * jnp.einsum("bthk,bshk->bhts", q.astype(dtype), keys)
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        if bias is not None:
            logits += bias.astype(dtype)
        mask = visibility.mask()
        seen = jnp.ones((1, 1, *logits.shape[2:]), bool) if mask is None else mask[:, None]
        # Unseen logits leave by `where` on both sides of exp, so that no infinity meets a zero in the gradient.
        largest = jnp.max(jnp.where(seen, logits, -jnp.inf), axis=-1, keepdims=True)
        sink = None if sinks is None else sinks.astype(dtype)[:, None, None]
        if sink is not None:
            largest = jnp.maximum(largest, sink)
        largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0))
        weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits - largest, 0)), 0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if sink is not None:
            total += jnp.exp(sink - largest)
        safe = jnp.where(total == 0, 1, total)
        return weights / safe, jnp.where(total == 0, NOTHING, largest + jnp.log(safe))[..., 0]
