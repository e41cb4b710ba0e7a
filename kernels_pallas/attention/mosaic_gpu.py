"""Attention on NVIDIA Hopper: kernels in Mosaic GPU, and what surrounds them in plain JAX."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention.mosaic_gpu_backward import keys_backward, queries_backward
from kernels_pallas.attention.mosaic_gpu_forward import forward
from kernels_pallas.attention.mosaic_gpu_tiles import KEY_MARKS, TILE, Options
from kernels_pallas.attention.reference import NOTHING
from kernels_pallas.attention.visibility import Visibility
from kernels_pallas.attention.visits import stretches, tiles
from kernels_pallas.dispatch import unfit

_LOG2E = math.log2(math.e)
_UNIT, _WIDEST = 64, 256
"""Widths of heads are filled up to a multiple of the first; the largest there is a kernel for."""


def obstacles(q, k, v, sinks, bias, visibility: Visibility, softcap: float | None) -> list[str]:
    """What of this call the kernels cannot honour, in words; empty if they can run."""
    checks = {
        f"dtypes {q.dtype}, {k.dtype}, {v.dtype} that differ": not q.dtype == k.dtype == v.dtype,
        f"head size {q.shape[-1]}, {v.shape[-1]}": max(q.shape[-1], v.shape[-1]) > _WIDEST,
        "bias": bias is not None,
        "query_positions or key_positions": not visibility.in_order,
    }
    dtypes = unfit({"q": q, "k": k, "v": v}, "bfloat16", "float16")
    return dtypes or [name for name, fails in checks.items() if fails]


CHOICES = {"keys": (64, 128), "stages": (2, 3), "backward_keys": (64, 128), "backward_stages": (1, 2)}
"""Block sizes that tuning tries."""


def heuristic(q, k, v, visibility: Visibility) -> dict[str, int]:
    """Keys of a tile, or queries where a kernel goes over these, and how many tiles are on their way at a time.

    It rests on what fits, not on measurement: 227 KiB of shared memory, and 240 registers per thread for float32 sums
    of 64 rows by the head size besides one or two tiles of logits, without spills under any mask.
    """
    width = max(_filled(q.shape[-1]), _filled(v.shape[-1]))
    forward = {"keys": 128 if width <= 128 else 64, "stages": 2}
    backward = {"backward_keys": 128 if width <= 64 else 64, "backward_queries": 64}
    return forward | backward | {"backward_stages": 2, "backward_value_stages": 2 if width <= 128 else 1}


def attention(
    q, k, v, sinks, bias, visibility: Visibility, *, scale: float, softcap: float | None, blocks, simulated: bool
):
    """q [B,T,H,K], k [B,S,G,K], v [B,S,G,V], sinks [H] or None -> y [B,T,H,V] in q's dtype, lse float32 [B,T,H]."""
    time, keys, value_width = q.shape[1], k.shape[1], v.shape[3]
    if scale <= 0:  # the kernels take the largest of what they have not scaled yet
        q, scale = q * np.sign(scale).astype(q.dtype), abs(scale) or 1.0
    options = Options(
        rule=visibility.rule(),
        scale=scale,
        softcap=softcap,
        time=time,
        keys=keys,
        blocks=tuple(blocks.items()),
        simulated=simulated,
    )
    q, k, v = (_fill(x, 1, TILE) for x in (q, k, v))
    q, k, v = _fill(q, 3, _UNIT), _fill(k, 3, _UNIT), _fill(v, 3, _UNIT)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32)
    y, lse = _attend(options, q, k, v, sinks, visibility)
    return y[:, :time, :, :value_width], lse[:, :, :time].swapaxes(1, 2)


def _filled(width: int) -> int:
    return -(-width // _UNIT) * _UNIT


def _fill(value, axis: int, unit: int):
    """`value` filled with zeros along an axis, to a multiple of `unit`."""
    missing = -value.shape[axis] % unit
    return jnp.pad(value, [(0, missing if i == axis else 0) for i in range(value.ndim)]) if missing else value


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, q, k, v, sinks, visibility: Visibility):
    """As `forward` of the kernel, with the masks of the call, whose arrays are not filled up."""
    return _forward(options, q, k, v, sinks, visibility)[0]


def _marks(visibility: Visibility):
    """What `forward` takes as marks."""
    prefix, marks = visibility.prefix_length, dict.fromkeys(("prefix", "query_ids", *KEY_MARKS))
    if prefix is not None:
        marks["prefix"] = jnp.minimum(prefix, visibility.key_positions.shape[1]).astype(jnp.int32)
    if visibility.segment_ids is not None:
        marks["query_ids"] = _fill(visibility.segment_ids.astype(jnp.int32), 1, TILE)
        marks["key_ids"] = _fill(visibility.key_segment_ids.astype(jnp.int32), 1, TILE)
        if visibility.window is not None and visibility.kept:
            marks["key_ranks"] = _fill(visibility.key_ranks, 1, TILE)
    return marks


def _forward(options: Options, q, k, v, sinks, visibility: Visibility):
    base2 = None if sinks is None else jnp.maximum(sinks * _LOG2E, NOTHING)
    seen = tiles(visibility, options.time, options.keys, (TILE, options["keys"]))
    y, lse = forward(options, q, k, v, base2, _marks(visibility), stretches(*seen))
    return (y, lse), (q, k, v, sinks, visibility, y, lse)


def _backward(options: Options, residuals, changes):
    (q, k, v, sinks, visibility, y, lse), (dy, dlse) = residuals, changes
    delta = jnp.einsum("bthv,bthv->bht", dy, y, preferred_element_type=jnp.float32) - dlse
    base2 = jnp.where(lse <= NOTHING, -NOTHING, lse * _LOG2E)
    arguments = q, k, v, dy.astype(q.dtype), jnp.stack([base2, delta], axis=2), _marks(visibility)
    seen = tiles(visibility, options.time, options.keys, (TILE, options["backward_keys"]))
    dq = queries_backward(options, *arguments, stretches(*seen))
    seen = tiles(visibility, options.time, options.keys, (options["backward_queries"], TILE))
    by_key = stretches(*(x.swapaxes(1, 2) for x in seen))
    if q.shape[-1] + v.shape[-1] <= _WIDEST:
        dk, dv = keys_backward(options, *arguments, by_key)
    else:  # the registers hold one of the two sums
        (dk,), (dv,) = (keys_backward(options, *arguments, by_key, (name,)) for name in ("dk", "dv"))
    dsinks = None if sinks is None else -jnp.sum(jnp.exp(sinks[:, None] - lse) * delta, axis=(0, 2))
    return dq, dk, dv, dsinks, None


_attend.defvjp(_forward, _backward)
