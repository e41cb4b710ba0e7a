"""Attention whose tokens are divided over devices: keys and values go around, and parts merge by their logsumexps.

Each device keeps its queries and sees, one after the other, the keys and values of all devices before it (Liu et al.
2023, arXiv 2310.01889). Steps that no query needs are left out: of a window all but the first few, and of causal order
those in which keys come after queries, on the devices where they do.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas.attention.reference import NOTHING
from kernels_pallas.attention.visibility import Visibility
from kernels_pallas.over_time import AXIS
from kernels_pallas.partition import partitioned

_TOKENS = ("batch", "time", "heads")
_OF_KEYS = ("key_positions", "key_ranks", "key_segment_ids")


def attention(run, q, k, v, sinks, bias, visibility: Visibility):
    """y [B,T,H,V] and logsumexps [B,T,H]; ``run(q, k, v, sinks, bias, visibility)`` returns both of one device's part.

    q, k and v are of the same tokens. bias [1|B,1|H,T,T].
    """
    leaves, structure = jax.tree.flatten(visibility)

    def local(q, k, v, sinks, bias, *leaves):
        return _ring(run, q, k, v, sinks, bias, jax.tree.unflatten(structure, leaves))

    rows = [("batch" if leaf.shape[0] == q.shape[0] else None, "time")[: leaf.ndim] for leaf in leaves]
    whole = (None, None, None, None) if bias is None else bias.shape
    per_bias = ("batch" if whole[0] != 1 else None, "heads" if whole[1] != 1 else None, "time")
    axes = (_TOKENS, _TOKENS, _TOKENS, ("heads",), per_bias, *rows)
    return partitioned(local, (q, k, v, sinks, bias, *leaves), axes, (_TOKENS, _TOKENS))


def _ring(run, q, k, v, sinks, bias, seen: Visibility):
    ways, here, length = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS), q.shape[1]
    onward = [(source, (source + 1) % ways) for source in range(ways)]
    y, lse = None, None
    held = k, v, {name: getattr(seen, name) for name in _OF_KEYS}
    for step in range(_steps(seen, length, ways)):
        if step:
            held = jax.lax.ppermute(held, AXIS, onward)
        origin = (here - step) % ways
        slice_of = None if bias is None else jax.lax.dynamic_slice_in_dim(bias, origin * length, length, axis=3)
        part = (q, *held[:2], sinks if step == 0 else None, slice_of, _part(seen, held[2], step, length))
        if step == 0:
            y, lse = run(*part)
            y = y.astype(lse.dtype)
        else:
            y, lse = _merged(y, lse, *_unless_later(run, part, lse, seen, here >= step))
    return y.astype(q.dtype), lse


def _steps(seen: Visibility, length: int, ways: int) -> int:
    """How many devices' keys a query can see, its own included."""
    if not _by_index(seen) or seen.window is None or seen.kept:
        return ways
    return min(ways, 1 + -(-(seen.window - 1) // length))


def _by_index(seen: Visibility) -> bool:
    """Whether order is that of the row, and later keys are hidden."""
    return seen.in_order and seen.causal and seen.prefix_length is None


def _part(seen: Visibility, of_keys: dict, step: int, length: int) -> Visibility:
    """What these queries see of the keys that have come `step` devices far."""
    by_index, seen = _by_index(seen), dataclasses.replace(seen, **of_keys, in_order=False)
    if not by_index or seen.kept:
        return seen
    index = jnp.arange(length, dtype=jnp.int32)[None]
    here = dataclasses.replace(seen, query_positions=index, key_positions=index, key_ranks=index, in_order=True)
    if step == 0:
        return here
    if seen.window is None:
        return dataclasses.replace(here, causal=False)
    return dataclasses.replace(here, query_positions=index + step * length, in_order=False)


def _unless_later(run, part, lse, seen: Visibility, earlier):
    """The part, or nothing where the keys come after the queries."""
    q, _, v, *_ = part

    def nothing():
        return jnp.zeros((*q.shape[:3], v.shape[-1]), q.dtype), jnp.full_like(lse, NOTHING)

    return jax.lax.cond(earlier, lambda: run(*part), nothing) if _by_index(seen) else run(*part)


def _merged(y, lse, more, more_lse):
    """Outputs over two sets of keys as one over both, in the dtype of the logsumexps."""
    both = jnp.logaddexp(lse, more_lse)
    first, second = (jnp.exp(each - both)[..., None] for each in (lse, more_lse))
    return first * y + second * more.astype(lse.dtype), both
