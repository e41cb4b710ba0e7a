"""Linear attention: softmax attention with feature maps in place of the exponential, so that its state has one size."""

from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from efficient_lm.models.context import Context
from efficient_lm.models.layers.feature_maps import EluSpec, FeatureMapSpec, HedgehogSpec
from efficient_lm.models.layers.positions import NoPositionSpec, PositionSpec
from efficient_lm.models.mixers.matrix_state import MatrixState, MatrixStateSpec, turning_faults
from efficient_lm.models.parameters import Initialization
from efficient_lm.spec import OneOf

LEAST_WEIGHT = 1e-18
"""The sum of a token's weights counts as at least this, where no key resembles its query; its square is a float32."""


class LinearAttentionSpec(MatrixStateSpec):
    """``y_t = Σ_j φ(q_t) · φ'(k_j) v_j / Σ_j φ(q_t) · φ'(k_j)`` per head, over the tokens j up to t.

    (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 4 and 9.) A head has 64 values. The divisor is one more column of
    the state, which sums the keys' features.

    Attributes:
        feature_map: φ for queries and φ' for keys; what a map learns, each of the two learns by itself.
        position: how queries and keys turn before the map; without, order is known from causality alone.
    """

    usual_head = 64

    kind: Literal["linear_attention"] = "linear_attention"
    feature_map: OneOf[FeatureMapSpec] = EluSpec()
    position: OneOf[PositionSpec] = NoPositionSpec()

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        yield from super().faults(width)
        yield from turning_faults(self.position, self.resolved(width).key_size)

    def state_shape(self, width: int) -> tuple[int, int, int]:
        heads, keys, values = super().state_shape(width)
        return heads, self.feature_map.features(keys), values + 1

    def weights(self, width: int) -> int:
        sizes = self.resolved(width)
        return super().weights(width) + 2 * sizes.heads * self.feature_map.weights(sizes.key_size)

    def build(self, width: int, init: Initialization) -> "LinearAttention":
        return LinearAttention(self, width, init)

    def flops_per_token(self, width: int, context_length: int) -> float:
        """Maps, learned features, and the recurrent form: two products per entry of the state."""
        heads, rows, columns = self.state_shape(width)
        return 2.0 * self.weights(width) + 4 * heads * rows * columns


class HedgehogAttentionSpec(LinearAttentionSpec):
    """Linear attention whose feature maps are learned (Zhang et al. 2024, arXiv 2402.04347)."""

    kind: Literal["hedgehog"] = "hedgehog"
    feature_map: OneOf[FeatureMapSpec] = HedgehogSpec()


class LinearAttention(MatrixState):
    def __init__(self, spec: LinearAttentionSpec, width: int, init: Initialization):
        super().__init__(spec, width, init)
        heads, size = self.spec.heads, self.spec.key_size
        self.query_features = spec.feature_map.build(heads, size, init)
        self.key_features = spec.feature_map.build(heads, size, init)
        self.position = spec.position.build(heads, size)

    def _read(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array, None]:
        pair = self.query_key(x)
        q, k = (self.position.rotate(pair[:, :, index], context.positions) for index in (0, 1))
        v = self.value(x).astype(jnp.float32)
        counted = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        return _scaled_to_one(self.query_features(q)), self.key_features(k), counted, None

    def _normed(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return (y[..., :-1] / jnp.maximum(y[..., -1:], LEAST_WEIGHT)).astype(x.dtype)


def _scaled_to_one(features: jax.Array) -> jax.Array:
    """Features over the largest of the same query, which both sums then lack: neither leaves the range of float32."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(features), axis=-1, keepdims=True))
    return features / jnp.where(largest > 0, largest, 1.0)
