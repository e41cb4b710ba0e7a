"""What kernels with products share on Hopper GPUs: operands, swizzled tiles, and a stream of tiles to the tensor cores.

Tensor cores multiply 16-bit numbers. A float32 operand is two of them, its upper and its lower half in bfloat16, and a
product is three: upper × upper + upper × lower + lower × upper, with a relative error of about 2^-16. Operands are
therefore stacks of halves, [1, ...] or [2, ...], and a contraction runs over the pairs of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CONTRACTION = 64
"""Numbers of the contracted axis that a step multiplies: 128 bytes, the width of the widest swizzle."""
ALIGNMENT = 8
"""Rows of a swizzled tile in memory begin at multiples of this."""
DTYPES = ("bfloat16", "float16", "float32")
"""Of operands."""


def halves(x: jax.Array) -> jax.Array:
    """`x [...]` as [1, ...] if it has 16 bits a number, else as [2, ...] in bfloat16: rounded, and what that lost."""
    if x.dtype.itemsize == 2:
        return x[None]
    upper = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return jnp.stack([upper, x - upper]).astype(jnp.bfloat16)


def steps(operand, length: int) -> int:
    """How many steps a contraction of `length` numbers of stacked operands takes: one pass for every pair of halves."""
    return (1 if operand.shape[0] == 1 else 3) * (-(-length // CONTRACTION))


def position(step, passes: int):
    """Which half of the left operand, of the right one, and which part of the contraction a step multiplies."""
    order = lax.div(step, jnp.int32(passes))
    return lax.div(order, jnp.int32(2)), lax.rem(order, jnp.int32(2)), lax.rem(step, jnp.int32(passes)) * CONTRACTION


def tile(shape: Sequence[int], dtype) -> plgpu.SMEM:
    """Shared memory for tiles [..., rows, columns], laid out as tensor cores and wide copies like it."""
    swizzle = plgpu.find_swizzle(shape[-1] * jnp.dtype(dtype).itemsize * 8)
    columns = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        tuple(shape), dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle))
    )


def barrier(stages: int) -> plgpu.Barrier:
    """What a `Stream` waits on: for each slot, both tiles."""
    return plgpu.Barrier(num_arrivals=2, num_barriers=stages)


def interpreted(simulated: bool):
    """What `plgpu.kernel` takes as `interpret`."""
    return plgpu.InterpretGPUParams(detect_races=True) if simulated else None


@dataclass(frozen=True)
class Stream:
    """Pairs of tiles on their way through slots of shared memory to the tensor cores, fetched ahead of their use.

    Attributes:
        sources: of a step, the two tiles in global memory.
        slots: the two buffers [stages, ...] in shared memory, of at least two stages.
        arrived: the barriers, one a slot.
        length: steps in all; a Python or a traced integer.
    """

    sources: Callable
    slots: Sequence
    arrived: object
    length: object

    @property
    def stages(self) -> int:
        return self.slots[0].shape[0]

    def start(self) -> None:
        """Fetch the tiles of the first steps."""
        for step in range(self.stages):
            self._fetch(jnp.int32(step))

    def _fetch(self, step) -> None:
        slot = lax.rem(step, jnp.int32(self.stages))

        @pl.when(step < self.length)
        def _():
            for source, buffer in zip(self.sources(step), self.slots, strict=True):
                plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.arrived.at[slot])

    def product(self, shape: Sequence[int], first, count, multiply: Callable) -> jax.Array:
        """The float32 sum `[rows, columns]` of ``multiply(acc, step, left, right)`` for `count` steps from `first`.

        All steps must be taken in order, by one call or several.
        """

        def one(acc, step, _):
            slot = lax.rem(step, jnp.int32(self.stages))
            plgpu.barrier_wait(self.arrived.at[slot])
            multiply(acc, step, *(buffer.at[slot] for buffer in self.slots))
            plgpu.wgmma_wait(1)

            @pl.when(step > 0)  # the product before this one is done, and its slot free
            def _():
                self._fetch(step + (self.stages - 1))

            return _

        def summed(acc):
            lax.fori_loop(first, first + count, lambda step, _: one(acc, step, _), None)
            return acc[...]

        return pl.run_scoped(summed, plgpu.ACC(tuple(shape), jnp.float32))


def product(shape: Sequence[int], sources: Callable, multiply: Callable, length, slots: Sequence) -> jax.Array:
    """The float32 sum `[rows, columns]` of the products of `length` pairs of tiles, see `Stream`; zeros without any.

    Args:
        slots: the shared memory to stream through, both [stages, ...] and made by `tile`.
    """

    def streamed(left_s, right_s, arrived):
        stream = Stream(sources, (left_s, right_s), arrived, length)
        stream.start()
        return stream.product(shape, 0, length, multiply)

    return pl.run_scoped(streamed, *slots, barrier(slots[0].shape[0]))


def store(target, dtype, *parts: Callable[[], jax.Array]) -> None:
    """Write a tile to global memory, given in equal parts [rows, columns] from left to right.

    They are made one after the other, so that registers hold one at a time besides what they are made of.
    """

    def staged(buffer):
        columns = buffer.shape[1] // len(parts)
        for i, part in enumerate(parts):
            buffer.at[:, pl.ds(i * columns, columns)][...] = part().astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, target)
        plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(staged, tile(target.shape, dtype))
