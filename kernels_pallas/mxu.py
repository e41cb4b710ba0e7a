"""What kernels with products share on TPUs: products on the matrix unit, and sizes of blocks."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

DTYPES = ("bfloat16", "float32")
"""Of operands."""


def dot(left: jax.Array, right: jax.Array, contracted: tuple[Sequence[int], Sequence[int]]) -> jax.Array:
    """The float32 product over these axes; float32 operands in full precision."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return lax.dot_general(left, right, (contracted, ((), ())), precision, jnp.float32)


def part(length: int, most: int) -> int:
    """The largest size up to `most` of equal blocks of an axis, padded to a multiple of 128: a multiple of 128."""
    lanes = -(-length // 128)
    return 128 * max(size for size in range(1, max(1, most // 128) + 1) if lanes % size == 0)


def interpreted(simulated: bool):
    """What `pl.pallas_call` takes as `interpret`: a simulation of the memory, which begins as NaN."""
    return pltpu.InterpretParams() if simulated else False
