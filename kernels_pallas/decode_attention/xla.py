"""Decoding in plain JAX: pages are gathered first; a single query then reads the cache once, as it lies."""

from kernels_pallas.attention import xla
from kernels_pallas.decode_attention.cache import Cache


def decode_attention(q, cache: Cache, sinks, *, window: int | None, softcap: float | None, scale: float):
    """q [B,T,H,K], sinks [H] or None -> [B,T,H,V] in q's dtype."""
    rows = cache.gathered()
    k, v = rows.k.astype(q.dtype), rows.v.astype(q.dtype)
    return xla.attention(q, k, v, sinks, None, rows.visibility(q.shape[1], window), scale=scale, softcap=softcap)[0]
