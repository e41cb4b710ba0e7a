"""Feature maps of linear attention: ``φ(q) · φ(k)`` in place of the exponential of softmax attention."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_lm.models.layers.activations import relu
from efficient_lm.models.layers.linear import by_head
from efficient_lm.models.parameters import ZEROS, Initialization, Pattern, parameter
from efficient_lm.spec import Choice

LARGEST_EXPONENT = 30.0
"""Bound of exponents, so that sums over products of two features stay far within float32."""


class FeatureMapSpec(Choice, role="feature map"):
    """What linear attention makes of each query and each key, head by head."""

    def features(self, size: int) -> int:
        """How many features there are of `size` values."""
        return size

    def weights(self, size: int) -> int:
        """Weights of one head's map."""
        return 0

    def build(self, heads: int, size: int, init: Initialization) -> "FeatureMap":
        """The module for `heads` of `size` values."""
        raise TypeError(f"{type(self).__name__} does not define build")


class EluSpec(FeatureMapSpec):
    """``elu(x) + 1`` (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7)."""

    kind: Literal["elu"] = "elu"

    def build(self, heads: int, size: int, init: Initialization) -> "FeatureMap":
        return Elementwise(_elu_plus_one)


class ReluSpec(FeatureMapSpec):
    """``max(x, 0)`` (Kasai et al. 2021, arXiv 2103.13076, without its map)."""

    kind: Literal["relu"] = "relu"

    def build(self, heads: int, size: int, init: Initialization) -> "FeatureMap":
        return Elementwise(relu)


class TaylorSpec(FeatureMapSpec):
    """``φ(q) · φ(k) = 1 + s + s² / 2`` with ``s = q · k / sqrt(size)``, the exponential to second order.

    (Arora et al. 2024, Based, arXiv 2402.18668.) Of the products of two values each is kept once, so that
    there are ``1 + size + size (size + 1) / 2`` features.
    """

    kind: Literal["taylor"] = "taylor"

    def features(self, size: int) -> int:
        return 1 + size + size * (size + 1) // 2

    def build(self, heads: int, size: int, init: Initialization) -> "FeatureMap":
        return Taylor(size)


class HedgehogSpec(FeatureMapSpec):
    """``[exp(W x + b), exp(-W x - b)]``, W per head from the identity and b from zero.

    (Zhang et al. 2024, arXiv 2402.04347, section 4.) Exponents are held within ±30.

    Attributes:
        softmax: whether the features of a query or key are divided by their sum, which bounds them.
    """

    kind: Literal["hedgehog"] = "hedgehog"
    softmax: bool = True

    def features(self, size: int) -> int:
        return 2 * size

    def weights(self, size: int) -> int:
        return size * size

    def build(self, heads: int, size: int, init: Initialization) -> "FeatureMap":
        return Hedgehog(self, heads, size)


class FeatureMap(nnx.Module):
    """``φ``: `x [batch, time, heads, size]` → float32 ``[batch, time, heads, features]``."""

    def __call__(self, x: jax.Array) -> jax.Array:
        raise TypeError(f"{type(self).__name__} does not define __call__")


class Elementwise(FeatureMap):
    def __init__(self, function):
        self.function = function

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.function(x.astype(jnp.float32))


def _elu_plus_one(x: jax.Array) -> jax.Array:
    # Not elu(x) + 1, which is 0 below -17.
    return relu(x) + jnp.exp(jnp.minimum(x, 0))


class Taylor(FeatureMap):
    def __init__(self, size: int):
        self.size = size

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32) * self.size**-0.25
        first, second = np.triu_indices(self.size)
        products = wide[..., first] * wide[..., second] * np.where(first == second, math.sqrt(0.5), 1.0)
        return jnp.concatenate([jnp.ones_like(wide[..., :1]), wide, products.astype(jnp.float32)], axis=-1)


class Hedgehog(FeatureMap):
    def __init__(self, spec: HedgehogSpec, heads: int, size: int):
        axes = {"heads": heads, "state": size, "feature": size}
        self.softmax = spec.softmax
        self.weight = parameter(axes, Pattern(identity_per_head), decay=True, matrix=((1,), (2,)))
        self.bias = parameter({"heads": heads, "feature": size}, ZEROS)

    def __call__(self, x: jax.Array) -> jax.Array:
        turned = by_head(x, self.weight[...]) + self.bias[...]
        both = jnp.concatenate([turned, -turned], axis=-1)
        if self.softmax:
            return jax.nn.softmax(both, axis=-1)
        return jnp.exp(jnp.clip(both, -LARGEST_EXPONENT, LARGEST_EXPONENT))


def identity_per_head(shape: tuple[int, ...]) -> jax.Array:
    """The identity matrix, for each head."""
    return jnp.broadcast_to(jnp.eye(shape[-1], dtype=jnp.float32), shape)
