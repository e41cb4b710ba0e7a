"""Gated linear attention: a decay per channel of the keys, which the input decides."""

from typing import Literal

import jax
import jax.numpy as jnp

from efficient_lm.models.context import Context
from efficient_lm.models.layers.linear import Linear, LowRank, scaled
from efficient_lm.models.layers.norms import NormSpec, RMSNormSpec
from efficient_lm.models.mixers.matrix_state import MatrixState, MatrixStateSpec, gated
from efficient_lm.models.parameters import Initialization
from efficient_lm.spec import Count, OneOf, PerLayer, Positive


class GLASpec(MatrixStateSpec):
    """``S_t = diag(α_t) S_{t-1} + k_t v_tᵀ``, ``y_t = S_tᵀ q_t`` per head (Yang et al. 2023, arXiv 2312.06635, eq. 3),

    with ``α = sigmoid(W↑ W↓ x + b) ** (1 / τ)``, queries multiplied by ``key_size ** -0.5``, and
    ``W_o (norm(y) * silu(W_g x))`` (section 4.4). All keys together are half the width, all values the width.

    Attributes:
        rank: of the map of the decay.
        temperature: τ; the larger, the slower states are forgotten at first.
        norm: of each head's output, one scale for all heads.
    """

    key_share = 0.5

    kind: Literal["gla"] = "gla"
    heads: PerLayer[Count | None] = 4
    rank: Count = 16
    temperature: Positive = 16.0
    norm: OneOf[NormSpec] = RMSNormSpec(epsilon=1e-5)

    def counted(self) -> dict[str, tuple[str, ...]]:
        return super().counted() | {"state": ("key_size",), "rank": ("rank",)}

    def weights(self, width: int) -> int:
        sizes = self.resolved(width)
        decay = self.rank * (width + sizes.heads * sizes.key_size)
        return super().weights(width) + width * sizes.heads * sizes.value_size + decay

    def build(self, width: int, init: Initialization) -> "GLA":
        return GLA(self, width, init)


class GLA(MatrixState):
    def __init__(self, spec: GLASpec, width: int, init: Initialization):
        super().__init__(spec, width, init)
        self.gate = Linear({"embed": width}, self.values, init=init)
        self.decay = LowRank(width, spec.rank, self.keys, init=init, bias=True)
        self.norm = spec.norm.build({"head_dim": self.spec.value_size})

    def _read(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        pair = self.query_key(x)
        q = scaled(pair[:, :, 0], self.spec.key_size**-0.5)
        return q, pair[:, :, 1], self.value(x), self.log_decay(x, context)

    def log_decay(self, x: jax.Array, context: Context) -> jax.Array:
        """``log α``, float32 ``[batch, time, heads, key_size]``."""
        return jax.nn.log_sigmoid(self.decay(x).astype(jnp.float32)) / self.spec.temperature

    def _normed(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return gated(self.norm(y.astype(jnp.float32)), self.gate(x), "silu")
