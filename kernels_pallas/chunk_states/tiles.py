"""What the kernels over chunks share: tiles in shared memory, products of tiles, and values laid out for them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper

CHUNK = 64
"""Tokens of a chunk: the rows of a tensor core instruction."""

WGMMA = plgpu.Layout.WGMMA
ROWS, COLUMNS = WGMMA.reduce(1), WGMMA.reduce(0)
"""Vectors with an entry per row, or per column, of a matrix in the layout of the tensor cores."""


def tile(*shape: int):
    """Shared memory for a bfloat16 [..., rows, columns] operand of the tensor cores; columns a multiple of 64."""
    return hopper.tile(shape, jnp.bfloat16)


def quotient(number, by: int):
    """Of int32 numbers, also where Python's integers are int64."""
    return jax.lax.div(number, np.int32(by))


def remainder(number, by: int):
    """Likewise."""
    return jax.lax.rem(number, np.int32(by))


def loop(count: int, body, carry):
    """`jax.lax.fori_loop` from 0, with int32 steps."""
    return jax.lax.fori_loop(
        0, count, lambda step, carry: body(jax.lax.convert_element_type(step, np.int32), carry), carry
    )


def float_tile(*shape: int):
    """Shared memory for a float32 [..., rows, columns] tile; columns a multiple of 32."""
    return hopper.tile(shape, jnp.float32)


def product(*operands):
    """The sum of left @ right over pairs of tiles in shared memory, float32."""
    shape = (operands[0][0].shape[0], operands[0][1].shape[1])

    def run(total):
        for left, right in operands:
            plgpu.wgmma(total, left, right)
        return total[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def floats(ref):
    """A tile as float32 values."""
    return plgpu.load(ref, layout=WGMMA, optimized=False).astype(jnp.float32)


def vector(ref, layout):
    """A vector in shared memory. One that is needed both per row and per column lies there twice."""
    return plgpu.load(ref, layout=layout, optimized=False)


def along_rows(values, shape):
    """[rows] as [rows, columns]."""
    return jax.lax.broadcast_in_dim(values, shape, [0])


def along_columns(values, shape):
    """[columns] as [rows, columns]."""
    return jax.lax.broadcast_in_dim(values, shape, [1])
