"""Moments of any optimizer in fewer bits: bfloat16, or blocks of eight-bit numbers with a scale each.

A transformation's arrays in the shape of a parameter are its moments. They are widened to float32 before a step and
narrowed after it; small ones and everything else in the state stay float32.

bfloat16 is rounded stochastically, to the nearer of two neighbours with the larger probability: a second moment moves
by less than half the distance of two neighbours in most steps, and rounded to the nearest would never move. The random
bits follow from the number of the step, so that a resumed run draws the same.

int8 is block-wise dynamic quantization (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"): the
values of a block, divided by the largest, in seven decades that have half as many codes each as the one above. Blocks
lie along the last axis, so that codes have the shape of their parameter and live where it does. A positive square is
never rounded to zero, which would divide a step by nothing.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Precision = Literal["float32", "bfloat16", "int8"]

SMALLEST = 4096
"""Values from which on a moment is narrowed."""

BLOCK = 256
"""Most values that share a scale."""

LEAST_BLOCK = 16
"""Fewest; an axis that divides into smaller blocks alone is left as it is."""

SQUARES = ("nu", "second", "curvature")
"""Names of the parts of states that hold squares, which have no sign to keep."""


class Quantized(NamedTuple):
    """int8 `codes` (uint8 of squares) in the shape of the array, float32 `scales` [..., blocks]."""

    codes: jax.Array
    scales: jax.Array


class KeptState(NamedTuple):
    """Steps taken, and the state of a transformation with its moments narrowed."""

    count: jax.Array
    state: Any


def kept_in(precision: Precision, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation, with its moments kept in a precision."""
    if precision == "float32":
        return inner
    inner = optax.with_extra_args_support(inner)

    def narrowed(state: Any, params: Any, count: jax.Array) -> Any:
        def is_moment(array: Any, param: Any) -> Any:
            if _is_absent(array):
                return array
            fits = precision == "bfloat16" or block_size(array.shape) >= LEAST_BLOCK
            return array.shape == param.shape and array.size >= SMALLEST and fits

        moments = optax.tree_map_params(
            inner, is_moment, state, params, transform_non_params=lambda _: False, is_leaf=_is_absent
        )
        key, places = jax.random.fold_in(jax.random.key(0), count), iter(range(10**9))

        def narrow(path: tuple, array: jax.Array, chosen: bool) -> Any:
            if not chosen:
                return array
            if precision == "bfloat16":
                return stochastically_rounded(array, jax.random.fold_in(key, next(places)))
            return quantized(array, signed=not any(getattr(step, "name", None) in SQUARES for step in path))

        return jax.tree_util.tree_map_with_path(narrow, state, moments)

    def init(params: Any) -> KeptState:
        count, state = jnp.zeros((), jnp.int32), inner.init(params)
        return KeptState(count, narrowed(state, params, count) if jax.tree.leaves(params) else state)

    def update(updates: Any, kept: KeptState, params: Any = None, **extra: Any) -> tuple[Any, KeptState]:
        wide = jax.tree.map(widened, kept.state, is_leaf=is_quantized)
        updates, state = inner.update(updates, wide, params, **extra)
        count = optax.safe_increment(kept.count)
        return updates, KeptState(count, narrowed(state, params, count))

    return optax.GradientTransformationExtraArgs(init, update)


def is_quantized(leaf: Any) -> bool:
    """For ``jax.tree.map(..., is_leaf=is_quantized)``."""
    return isinstance(leaf, Quantized)


def _is_absent(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def widened(leaf: Any) -> Any:
    """float32 of a narrowed moment; anything else as it is."""
    if is_quantized(leaf):
        return restored(leaf)
    return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf


def stochastically_rounded(values: jax.Array, key: jax.Array) -> jax.Array:
    """bfloat16 of float32 values, whose mean over keys is the value."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    bits = bits + jax.random.bits(key, values.shape, jnp.uint16).astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(values), cut, values).astype(jnp.bfloat16)


def block_size(shape: tuple[int, ...]) -> int:
    """Values per block: the largest divisor of the last axis that is not above `BLOCK`."""
    last = shape[-1] if shape else 1
    return max(size for size in range(1, min(BLOCK, last) + 1) if last % size == 0)


def _values(signed: bool) -> np.ndarray:
    """What each code stands for, from 0 to 1: float32 [128] of signed numbers, [256] of squares."""
    decades = 7 if signed else 8
    values = [0.0]
    for decade in range(decades):
        middles = 0.1 + 0.9 * (np.arange(2**decade) + 0.5) / 2**decade
        values += list(middles * 10.0 ** (decade - decades + 1))
    return np.asarray([*values[:-1], 1.0], np.float32)


def quantized(values: jax.Array, signed: bool) -> Quantized:
    """Codes of float32 values, in blocks along the last axis; `signed` False promises that none is negative."""
    blocks = values.reshape(*values.shape[:-1], -1, block_size(values.shape))
    scales = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    parts = jnp.abs(blocks) / jnp.where(scales > 0, scales, 1.0)
    top = 6 if signed else 7
    decade, factor = jnp.zeros(parts.shape, jnp.int32), jnp.full(parts.shape, 10.0**top, jnp.float32)
    for below in range(top, 0, -1):
        reached = parts > 10.0**-below
        decade, factor = decade + reached, jnp.where(reached, 10.0 ** (below - 1), factor)
    count = jnp.left_shift(1, decade)
    place = jnp.floor((parts * factor - 0.1) / 0.9 * count).astype(jnp.int32)
    codes = count + jnp.clip(place, 0, count - 1)
    codes = jnp.where(parts > (0.275 * 10.0**-top if signed else 0.0), codes, 0)
    codes = jnp.where(blocks < 0, -codes, codes).astype(jnp.int8 if signed else jnp.uint8)
    return Quantized(codes.reshape(values.shape), scales[..., 0])


def restored(kept: Quantized) -> jax.Array:
    """float32 of the codes."""
    signed = kept.codes.dtype == jnp.int8
    codes = kept.codes.astype(jnp.int32)
    values = jnp.sign(codes) * jnp.asarray(_values(signed))[jnp.abs(codes)]
    blocks = values.reshape(*kept.scales.shape, -1) * kept.scales[..., None]
    return blocks.reshape(kept.codes.shape)
