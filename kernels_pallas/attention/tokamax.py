"""tokamax's fused attention, for the arguments it knows; an optional package."""

import importlib
import importlib.util

import jax

from kernels_pallas.attention.visibility import Visibility


def obstacles(q, k, bias, sinks, visibility: Visibility, softcap: float | None, return_lse: bool) -> list[str]:
    """What of this call tokamax cannot honour, in words; empty if it can run."""
    checks = {
        "calls where the package tokamax is not installed": importlib.util.find_spec("tokamax") is None,
        "sinks": sinks is not None,
        "bias with softcap": bias is not None and softcap is not None,  # it would cap the bias too
        "segment_ids": visibility.segment_ids is not None,
        "prefix_length": visibility.prefix_length is not None,
        "kept": visibility.window is not None and visibility.kept > 0,
        "query_positions or key_positions": not visibility.in_order,
        "a causal query length unlike the key length": visibility.causal and q.shape[1] != k.shape[1],
        "return_lse": return_lse,
    }
    return [name for name, fails in checks.items() if fails]


def attention(q, k, v, bias, visibility: Visibility, *, scale: float, softcap: float | None) -> jax.Array:
    """q [B,T,H,K], k [B,S,G,K], v [B,S,G,V], bias [1|B,1|H,T,S] or None -> [B,T,H,V]."""
    # It counts the keys beside the query, without the query's own.
    beside = None if visibility.window is None else visibility.window - 1
    window = None if beside is None else (beside, 0 if visibility.causal else beside)
    bias = None if bias is None else bias.astype(q.dtype)
    return importlib.import_module("tokamax").dot_product_attention(
        q, k, v, bias, scale=scale, is_causal=visibility.causal, local_window_size=window, logits_soft_cap=softcap
    )
