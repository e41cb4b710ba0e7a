"""cuDNN's fused attention, by way of `jax.nn.dot_product_attention`, for the arguments it knows."""

import jax
import jax.numpy as jnp

from kernels_pallas.attention.visibility import Visibility


def obstacles(q, k, v, sinks, visibility: Visibility, softcap: float | None, return_lse: bool) -> list[str]:
    """What of this call cuDNN cannot honour, in words; empty if it can run."""
    checks = {
        f"backend {jax.default_backend()}": jax.default_backend() != "gpu",
        f"dtype {q.dtype}": q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype,
        f"head size {q.shape[-1]}, {v.shape[-1]}": q.shape[-1] != v.shape[-1] or q.shape[-1] % 8 or q.shape[-1] > 256,
        "sinks": sinks is not None,
        "softcap": softcap is not None,
        "segment_ids": visibility.segment_ids is not None,
        "prefix_length": visibility.prefix_length is not None,
        "kept": visibility.window is not None and visibility.kept > 0,
        "query_positions or key_positions": not visibility.in_order,
        "a causal query length unlike the key length": visibility.causal and q.shape[1] != k.shape[1],
        "a window that is not causal": visibility.window is not None and not visibility.causal,
        "return_lse": return_lse,
    }
    return [name for name, fails in checks.items() if fails]


def attention(q, k, v, bias, visibility: Visibility, *, scale: float) -> jax.Array:
    """q [B,T,H,K], k [B,S,G,K], v [B,S,G,K], bias [1|B,1|H,T,S] or None -> [B,T,H,K]."""
    # JAX counts the keys to the left of the query, without the query's own.
    window = None if visibility.window is None else (visibility.window - 1, 0)
    bias = None if bias is None else bias.astype(q.dtype)
    return jax.nn.dot_product_attention(
        q, k, v, bias, is_causal=visibility.causal, local_window_size=window, scale=scale, implementation="cudnn"
    )
