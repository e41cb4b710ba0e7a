"""A norm and a gate together, at the end of recurrent mixers."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.models.layers.activations import ACTIVATIONS, Activation
from efficient_lm.models.parameters import ONES, parameter

Order = Literal["gate_first", "norm_first"]
"""``rms(y * f(z)) * w`` (Mamba-2) or ``rms(y) * w * f(z)`` (gated DeltaNet, RetNet)."""


class GatedNorm(nnx.Module):
    """Root-mean-square norm of `y` gated by ``activation(z)``; everything in float32.

    Args:
        axes: logical name → size of the last axes of `y`, which the scale has all of.
        over: how many of the last axes the mean is over; 1 norms each head or group by itself.
        order: whether the gate comes before or after the norm.
        activation: of the gate.
        epsilon: added to the mean square.
        shared: the scale has only the axes that the mean is over, one for all heads.
        groups: parts of the first axis, each normed by itself; its size is a multiple of them.
    """

    def __init__(
        self,
        axes: Mapping[str, int],
        *,
        over: int = 1,
        order: Order = "norm_first",
        activation: Activation = "silu",
        epsilon: float = 1e-5,
        shared: bool = False,
        groups: int = 1,
    ):
        names = list(axes)[-over:] if shared else list(axes)
        self.scale = parameter({name: axes[name] for name in names}, ONES)
        self.over, self.order, self.epsilon = tuple(range(-over, 0)), order, epsilon
        self.activation, self.groups = ACTIVATIONS[activation], groups

    def __call__(self, y: jax.Array, z: jax.Array) -> jax.Array:
        """`y`, `z` ``[..., *axes]`` → the same shape, in the dtype of `z`."""
        gate, wide = self.activation(z.astype(jnp.float32)), y.astype(jnp.float32)
        wide = wide * gate if self.order == "gate_first" else wide
        split = wide
        if self.groups > 1:
            place = wide.ndim - self.scale[...].ndim
            split = wide.reshape(*wide.shape[:place], self.groups, -1, *wide.shape[place + 1 :])
        normed = split * jax.lax.rsqrt(jnp.mean(split * split, axis=self.over, keepdims=True) + self.epsilon)
        normed = normed.reshape(wide.shape) * self.scale[...]
        return (normed if self.order == "gate_first" else normed * gate).astype(z.dtype)
