"""What the mixers of the delta rule share: normed keys, a strength of correction, a matrix of state per head."""

from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.models.context import Context
from efficient_lm.models.layers.activations import ACTIVATIONS, Activation
from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.layers.short_convolution import ShortConvolution
from efficient_lm.models.mixers.base import Cache, MixerSpec, dividing
from efficient_lm.models.mixers.recurrent import Implementation, documents, empty, entering, leaving
from efficient_lm.models.parameters import Initialization
from efficient_lm.spec import Count, PerLayer, Positive
from kernels_pallas.delta_rule import delta_rule

NORM_EPSILON = 1e-6
"""Added to the squared length of queries and keys."""


class DeltaRuleSpec(MixerSpec):
    """``S_t = (I - β_t k_t k_tᵀ) D_t S_{t-1} + β_t k_t v_tᵀ``, ``y_t = S_tᵀ q_t`` per head; D is the decay, if any.

    Queries, keys and values are ``f(convolution(W x))``; queries and keys are then brought to length 1 and queries
    multiplied by ``key_size ** -0.5``. ``β = sigmoid(W_β x)``.

    Attributes:
        heads: heads of values; None has as many as a usual head goes into the width.
        key_heads: heads of queries and keys, each read by ``heads / key_heads`` heads of values; None: as many.
        key_size, value_size: values per head of queries and keys, and of values; None follows from the width.
        convolution: taps of the short convolutions; None has none.
        activation: f.
        negative_eigenvalues: β within (0, 2), so that a state can turn (Grazzi et al. 2024, arXiv 2411.12537).
        epsilon: of the norm of each head's output.
        chunk_size, implementation: see `kernels_pallas.delta_rule`.
    """

    usual_head: ClassVar[int] = 128
    key_share: ClassVar[float] = 1.0
    """All keys together, as a share of the width."""
    value_share: ClassVar[float] = 1.0
    """A head's values, as a multiple of its keys."""

    heads: PerLayer[Count | None] = None
    key_heads: PerLayer[Count | None] = None
    key_size: Count | None = None
    value_size: Count | None = None
    convolution: Count | None = 4
    activation: Activation = "silu"
    negative_eigenvalues: bool = False
    epsilon: Positive = 1e-5
    chunk_size: Count | None = None
    implementation: Implementation = "auto"

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        sizes, keys = self.resolved(width), int(self.key_share * width)
        heads, key_heads = sizes.heads, sizes.key_heads
        if heads % key_heads:
            yield "key_heads", f"{key_heads} do not divide {heads} heads; {dividing(heads, key_heads)}"
        if not sizes.key_size:
            yield "heads", f"{key_heads} heads leave no keys in width {width}; at most {keys}, or set key_size"

    def resolved(self, width: int) -> "DeltaRuleSpec":
        keys = int(self.key_share * width)
        heads = self.heads or max(1, keys // (self.key_size or self.usual_head))
        key_size = self.key_size or keys // (self.key_heads or heads)
        value_size = self.value_size or max(1, round(self.value_share * key_size))
        sizes = {"heads": heads, "key_heads": self.key_heads or heads, "key_size": key_size, "value_size": value_size}
        return self.model_copy(update=sizes)

    def counted(self) -> dict[str, tuple[str, ...]]:
        return {"heads": ("key_heads", "heads"), "state": ("key_size",)}

    def flops_per_token(self, width: int, context_length: int) -> float:
        """Maps, convolutions, and the recurrent form: three products per entry of the state."""
        sizes = self.resolved(width)
        keys, values = 2 * sizes.key_heads * sizes.key_size, sizes.heads * sizes.value_size
        maps = 2.0 * width * (keys + 2 * values + sizes.heads)
        return maps + 2 * (self.convolution or 0) * (keys + values) + 6 * values * sizes.key_size


class DeltaRule(nnx.Module):
    """The maps that all have; a kind adds its decay, its gate and its norm."""

    def __init__(self, spec: DeltaRuleSpec, width: int, init: Initialization):
        self.spec = spec = spec.resolved(width)
        embed = {"embed": width}
        pair = {"query_key": 2, "groups": spec.key_heads, "state": spec.key_size}
        self.values = {"heads": spec.heads, "head_dim": spec.value_size}
        self.query_key = Linear(embed, pair, init=init, batch=1)
        self.value = Linear(embed, self.values, init=init)
        self.beta = Linear(embed, {"heads": spec.heads}, init=init)
        self.output = Linear(self.values, embed, init=init, residual=True)
        self.query_key_convolution = self._convolution(pair)
        self.value_convolution = self._convolution(self.values)

    def _convolution(self, axes: dict[str, int]) -> ShortConvolution | None:
        spec = self.spec
        if spec.convolution is None:
            return None
        return ShortConvolution(
            axes, spec.convolution, activation=spec.activation, implementation=spec.implementation
        )  # fmt: skip

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """`x [batch, time, width]` → the same shape and dtype, and the cache with these tokens added."""
        spec, start, ids = self.spec, entering(cache, context), documents(context, cache)
        pair, tails = self._convolved(self.query_key_convolution, self.query_key(x), ids, start, "query_key")
        v, more = self._convolved(self.value_convolution, self.value(x), ids, start, "value")
        unit = _unit(pair)
        q, k = unit[:, :, 0] * spec.key_size**-0.5, unit[:, :, 1]
        y, state = delta_rule(
            q.astype(x.dtype), k.astype(x.dtype), v, self._strength(x), self._decay(x, context),
            segment_ids=ids, initial_state=start.get("state"),
            chunk_size=spec.chunk_size, implementation=spec.implementation,
        )  # fmt: skip
        return self.output(self._normed(y, x)), leaving(cache, context, state=state, **tails, **more)

    def _convolved(
        self,
        convolution: ShortConvolution | None,
        x: jax.Array,
        ids: jax.Array | None,
        start: Cache,
        name: str,
    ) -> tuple[jax.Array, Cache]:
        """`x` after the convolution and the activation, and what the next token needs of it, by name."""
        if convolution is None:
            return ACTIVATIONS[self.spec.activation](x), {}
        y, tail = convolution(x, ids, start.get(name))
        return y, {name: tail}

    def _strength(self, x: jax.Array) -> jax.Array:
        """β, float32 ``[batch, time, heads]``."""
        strength = jax.nn.sigmoid(self.beta(x).astype(jnp.float32))
        return 2 * strength if self.spec.negative_eigenvalues else strength

    def _decay(self, x: jax.Array, context: Context) -> jax.Array | None:
        """Logarithm of D, float32 ``[batch, time, heads]`` or ``[batch, time, heads, key_size]``."""
        return None

    def _normed(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """What the output map reads of `y [batch, time, heads, value_size]`."""
        raise TypeError(f"{type(self).__name__} does not define _normed")

    def init_cache(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
        """State ``[batch, heads, key_size, value_size]``, float32, and the convolutions' last inputs."""
        spec = self.spec
        state = jnp.zeros((batch, spec.heads, spec.key_size, spec.value_size), jnp.float32)
        convolutions = {"query_key": self.query_key_convolution, "value": self.value_convolution}
        tails = {name: found.empty(batch, dtype) for name, found in convolutions.items() if found is not None}
        return empty(batch, state=state, **tails)


def _unit(x: jax.Array) -> jax.Array:
    """`x` over its length along the last axis, float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + NORM_EPSILON)
