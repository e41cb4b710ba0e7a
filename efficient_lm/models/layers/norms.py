"""Normalisation layers; statistics are float32 whatever the compute dtype."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.models.parameters import ONES, ZEROS, parameter
from efficient_lm.spec import Choice, Positive


class NormSpec(Choice, role="norm"):
    """A normalisation over the last axis."""

    def build(self, size: int, axis: str = "embed") -> nnx.Module:
        """The module for a last axis of `size` values, named `axis`."""
        raise TypeError(f"{type(self).__name__} does not define build")


class RMSNormSpec(NormSpec):
    """Root-mean-square norm (Zhang & Sennrich 2019, eq. 4): ``x / rms(x) * w``.

    With ``one_plus`` the scale is ``1 + w`` with `w` starting at zero, as in Gemma.
    """

    kind: Literal["rmsnorm"] = "rmsnorm"
    epsilon: Positive = 1e-6
    one_plus: bool = False

    def build(self, size: int, axis: str = "embed") -> nnx.Module:
        return RMSNorm(self, size, axis)


class LayerNormSpec(NormSpec):
    """Layer norm (Ba et al. 2016): ``(x - mean) / std * w + b``; ``scale`` and ``bias`` say whether w and b exist."""

    kind: Literal["layernorm"] = "layernorm"
    epsilon: Positive = 1e-5
    scale: bool = True
    bias: bool = True

    def build(self, size: int, axis: str = "embed") -> nnx.Module:
        return LayerNorm(self, size, axis)


class RMSNorm(nnx.Module):
    def __init__(self, spec: RMSNormSpec, size: int, axis: str):
        self.epsilon, self.one_plus = spec.epsilon, spec.one_plus
        self.scale = parameter({axis: size}, ZEROS if spec.one_plus else ONES)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [..., size]` → the same shape and dtype."""
        wide = x.astype(jnp.float32)
        scale = self.scale[...] + 1.0 if self.one_plus else self.scale[...]
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (normed * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    def __init__(self, spec: LayerNormSpec, size: int, axis: str):
        self.epsilon = spec.epsilon
        self.scale = parameter({axis: size}, ONES) if spec.scale else None
        self.bias = parameter({axis: size}, ZEROS) if spec.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [..., size]` → the same shape and dtype."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.epsilon)
        y = y if self.scale is None else y * self.scale[...]
        y = y if self.bias is None else y + self.bias[...]
        return y.astype(x.dtype)
