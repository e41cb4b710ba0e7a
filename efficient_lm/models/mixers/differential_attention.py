"""Differential attention: the difference of two softmax attentions, which cancels what both see in common."""

from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from efficient_lm.models.context import Context
from efficient_lm.models.layers.norms import NormSpec, RMSNormSpec
from efficient_lm.models.mixers.attention import HEAD_SIZE, Attention, AttentionSpec
from efficient_lm.models.parameters import Initialization, Normal, parameter
from efficient_lm.spec import Fraction, OneOf, PerLayer, Positive, Spec


class DepthCurve(Spec):
    """A value that goes with depth from `start`, in the model's first layer, towards `end`.

    Layer l, counted from 0, has ``end - (end - start) * exp(-rate * l)``, computed from the layer's index when the
    model runs: layers that differ in nothing else stay alike, and one scan runs them all.
    """

    start: Fraction
    end: Fraction
    rate: Positive

    def value(self, layer: jax.Array | int) -> jax.Array:
        """float32 scalar."""
        return self.end - (self.end - self.start) * jnp.exp(-self.rate * jnp.asarray(layer, jnp.float32))


class DifferentialAttentionSpec(AttentionSpec):
    """``(softmax(q1 k1ᵀ) - λ softmax(q2 k2ᵀ)) v`` per pair of heads (Ye et al. 2024, arXiv 2410.05258, eq. 1 to 3).

    Query heads h and h + heads / 2 are a pair, and so are key-value heads g and g + kv_heads / 2. A pair shares its two
    heads of values, side by side, so its output has twice the head size; it is normed by itself and multiplied by
    ``1 - lambda_init``. ``λ = exp(λq1 · λk1) - exp(λq2 · λk2) + lambda_init`` with learned vectors of `head_size`.

    Attributes:
        lambda_init: see above; ``0.8 - 0.6 exp(-0.3 layer)`` unless given, layers counted from 0.
        lambda_std: standard deviation that the learned vectors start with.
        head_norm: norm of each pair's output, over twice the head size.

    `heads` and `kv_heads` count single heads, and all other attributes are those of attention.
    """

    kind: Literal["differential_attention"] = "differential_attention"
    lambda_init: PerLayer[Fraction | DepthCurve] = DepthCurve(start=0.2, end=0.8, rate=0.3)
    lambda_std: Positive = 0.1
    head_norm: OneOf[NormSpec] = RMSNormSpec(epsilon=1e-5, scale=False)

    @property
    def goes_by_place(self) -> bool:
        return isinstance(self.lambda_init, DepthCurve)

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        for name in ("heads", "kv_heads"):
            count = getattr(self, name) or 2
            if count % 2:
                near = f"{count - 1} or {count + 1}" if count > 1 else "2"
                yield name, f"{count} cannot be paired, and every head needs a partner: take {near}"
        yield from super().faults(width)

    def head_count(self, width: int) -> int:
        return self.heads or 2 * max(1, width // (2 * (self.head_size or HEAD_SIZE)))

    def value_size(self, width: int) -> int:
        return 2 * self.size_per_head(width)

    def counted(self) -> dict[str, tuple[str, ...]]:
        # Heads work in pairs, the second half of them against the first.
        return {}

    def build(self, width: int, init: Initialization) -> "DifferentialAttention":
        return DifferentialAttention(self, width, init)


class DifferentialAttention(Attention):
    def __init__(self, spec: DifferentialAttentionSpec, width: int, init: Initialization):
        super().__init__(spec, width, init)
        vectors, start = {"pair": 2, "head_dim": self.size}, Normal(spec.lambda_std)
        self.lambda_query, self.lambda_key = parameter(vectors, start), parameter(vectors, start)
        self.head_norm = spec.head_norm.build({"pair_dim": 2 * self.size})

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, **masks: jax.Array | None
    ) -> jax.Array:
        """Both attentions of every pair at once: each reads the pair's two heads of values as one."""
        pairs = jnp.concatenate(jnp.split(v, 2, axis=-2), axis=-1)
        return super()._attend(q, k, jnp.concatenate([pairs, pairs], axis=-2), bias, **masks)

    def _combine(self, y: jax.Array, context: Context) -> jax.Array:
        first, second = jnp.split(y.astype(jnp.float32), 2, axis=-2)
        start = self.spec.lambda_init
        if isinstance(start, DepthCurve):
            start = start.value(context.layer)
        difference = self.head_norm(first - (self._lambda() + start) * second) * (1 - start)
        return difference.astype(y.dtype).reshape(*y.shape[:-1], self.size)

    def _lambda(self) -> jax.Array:
        """The learned part of λ, a float32 scalar."""
        first, second = jnp.exp(jnp.sum(self.lambda_query[...] * self.lambda_key[...], axis=-1))
        return first - second
