"""How the selective scan is cut for Hopper GPUs, and how a tile of states lies in the registers of a warpgroup."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import scan_gpu

WARPS = 4


def width(states: int) -> int:
    """Channels of a warp, such that a thread holds 16 numbers; 8 if there are 8 states."""
    return min(32, 512 // states)


@dataclass(frozen=True, kw_only=True)
class Plan(scan_gpu.Plan):
    """Sizes of one call, all after padding.

    A block holds a tile of states [4 warps, N states, W channels], 16 numbers per thread (8 for N = 8). In a warp, 4
    lanes share the states and 8 lanes the channels, so a sum over states is two exchanges between lanes and a sum over
    channels is three; neither leaves the warp.

    Attributes:
        states: N, a power of two from 8 to 64. `width` is that of so many.
        part: tokens whose decays and states the backward pass holds in registers at a time: 1, 2, 4 or 8.
    """

    states: int
    part: int
    block: ClassVar[int] = WARPS

    @property
    def tile(self) -> tuple[int, int, int]:
        """Shape of a block's states."""
        return WARPS, self.states, self.width

    @cached_property
    def layout(self):
        """Of a tile in registers."""
        tiling = plgpu.Tiling(((WARPS, 4, self.width), (self.width // 8,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)

    def load(self, reference) -> jax.Array:
        """A tile [4, N, W]."""
        return plgpu.load(reference, layout=self.layout, optimized=False)

    def channel(self, reference) -> jax.Array:
        """Values of channels [4, W], in float32."""
        return plgpu.load(reference, layout=self.layout.reduce(1), optimized=False).astype(jnp.float32)

    def state(self, reference) -> jax.Array:
        """Values of states [N], as a tile."""
        value = plgpu.load(reference, layout=self.layout.reduce((0, 2)), optimized=False)
        return jax.lax.broadcast_in_dim(value, self.tile, [1])

    def spread(self, channel: jax.Array) -> jax.Array:
        """Values of channels [4, W] as a tile."""
        return jax.lax.broadcast_in_dim(channel, self.tile, [0, 2])

    def decay(self, dt: jax.Array, A: jax.Array, mark) -> jax.Array:
        """2^(dt A + mark) of dt [4, W], A a tile in base 2, mark a number or None."""
        exponent = self.spread(dt) * A
        return scan_gpu.exp2(exponent if mark is None else exponent + mark, self.layout, simulated=self.simulated)
