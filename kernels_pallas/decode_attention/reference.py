"""The definition: `attention` to the whole cache, of whose slots a mask shows those that queries see."""

from kernels_pallas.attention import reference
from kernels_pallas.decode_attention.cache import Cache


def decode_attention(q, cache: Cache, sinks, *, window: int | None, softcap: float | None, scale: float):
    """q [B,T,H,K], sinks [H] or None -> [B,T,H,V] in q's dtype."""
    rows = cache.gathered()
    seen = rows.visibility(q.shape[1], window)
    return reference.attention(q, rows.k, rows.v, sinks, None, seen, scale=scale, softcap=softcap)[0]
