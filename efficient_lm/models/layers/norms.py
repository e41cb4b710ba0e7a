"""Normalisation layers; statistics are float32 whatever the compute dtype."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import model_validator
from pydantic_core import PydanticCustomError

from efficient_lm.models.layers.groups import Groups, spread
from efficient_lm.models.parameters import ONES, ZEROS, parameter
from efficient_lm.spec import Choice, Positive


class NormSpec(Choice, role="norm"):
    """A normalisation over the last axis, or over several last axes together."""

    def build(self, axes: int | Mapping[str, int]) -> nnx.Module:
        """The module for last axes of these names and sizes, in order; a number is the size of `embed`."""
        raise TypeError(f"{type(self).__name__} does not define build")


class RMSNormSpec(NormSpec):
    """Root-mean-square norm (Zhang & Sennrich 2019, eq. 4): ``x / rms(x) * w``.

    With ``one_plus`` the scale is ``1 + w`` with `w` starting at zero, as in Gemma; ``scale`` says whether w exists.
    """

    kind: Literal["rmsnorm"] = "rmsnorm"
    epsilon: Positive = 1e-6
    one_plus: bool = False
    scale: bool = True

    @model_validator(mode="after")
    def _has_what_it_shifts(self) -> "RMSNormSpec":
        if self.one_plus and not self.scale:
            raise PydanticCustomError("norm", "one_plus shifts the scale, and scale is false: drop one of them", {})
        return self

    def build(self, axes: int | Mapping[str, int]) -> nnx.Module:
        return RMSNorm(self, _named(axes))


class LayerNormSpec(NormSpec):
    """Layer norm (Ba et al. 2016): ``(x - mean) / std * w + b``; ``scale`` and ``bias`` say whether w and b exist."""

    kind: Literal["layernorm"] = "layernorm"
    epsilon: Positive = 1e-5
    scale: bool = True
    bias: bool = True

    def build(self, axes: int | Mapping[str, int]) -> nnx.Module:
        return LayerNorm(self, _named(axes))


def _named(axes: int | Mapping[str, int]) -> Mapping[str, int]:
    return {"embed": axes} if isinstance(axes, int) else axes


class RMSNorm(nnx.Module):
    """With `experts`, so many scales side by side; the call then takes the groups of its rows."""

    def __init__(self, spec: RMSNormSpec, axes: Mapping[str, int], experts: int | None = None):
        stack = {} if experts is None else {"experts": experts}
        self.epsilon, self.one_plus, self.axes = spec.epsilon, spec.one_plus, tuple(range(-len(axes), 0))
        self.scale = parameter({**stack, **axes}, ZEROS if spec.one_plus else ONES) if spec.scale else None

    def __call__(self, x: jax.Array, groups: Groups | None = None) -> jax.Array:
        """`x [..., *axes]` → the same shape and dtype; with groups, `[rows, *axes]`."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=self.axes, keepdims=True) + self.epsilon)
        if self.scale is not None:
            scale = spread(self.scale[...], groups, len(x))
            normed = normed * (scale + 1.0 if self.one_plus else scale)
        return normed.astype(x.dtype)


class LayerNorm(nnx.Module):
    def __init__(self, spec: LayerNormSpec, axes: Mapping[str, int]):
        self.epsilon, self.axes = spec.epsilon, tuple(range(-len(axes), 0))
        self.scale = parameter(axes, ONES) if spec.scale else None
        self.bias = parameter(axes, ZEROS) if spec.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [..., *axes]` → the same shape and dtype."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=self.axes, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=self.axes, keepdims=True) + self.epsilon)
        y = y if self.scale is None else y * self.scale[...]
        y = y if self.bias is None else y + self.bias[...]
        return y.astype(x.dtype)
