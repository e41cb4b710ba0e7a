"""Retention: linear attention that turns with position and forgets at a fixed rate per head."""

from typing import Literal

import jax
import jax.numpy as jnp

from efficient_lm.models.context import Context
from efficient_lm.models.layers.linear import scaled
from efficient_lm.models.layers.norms import LayerNormSpec, NormSpec
from efficient_lm.models.mixers.fixed_decay import FixedDecay, FixedDecaySpec
from efficient_lm.models.mixers.matrix_state import gated
from efficient_lm.models.parameters import Initialization
from efficient_lm.spec import OneOf


class RetentionSpec(FixedDecaySpec):
    """``S_t = γ S_{t-1} + k_t v_tᵀ``, ``y_t = S_tᵀ q_t / sqrt(key_size)`` per head (Sun et al. 2023, arXiv 2307.08621,

    eq. 6 to 8), with queries and keys turned by position, ``γ = 1 - 2 ** (-5 - h)`` for head h from 0, and
    ``W_o (norm(y) * silu(W_g x))``. A head has 256 keys; all values together are twice the width.

    Attributes:
        position: how queries and keys turn.
        norm: of each head's output; without scale and bias it is the group norm of the paper.
    """

    usual_head = 256
    value_share = 2.0

    kind: Literal["retention"] = "retention"
    norm: OneOf[NormSpec] = LayerNormSpec(scale=False, bias=False)

    def build(self, width: int, init: Initialization) -> "Retention":
        return Retention(self, width, init)


class Retention(FixedDecay):
    def __init__(self, spec: RetentionSpec, width: int, init: Initialization):
        super().__init__(spec, width, init)
        self.norm = spec.norm.build({"head_dim": self.spec.value_size})

    def _read(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        pair = self.query_key(x)
        q, k = (self.position.rotate(pair[:, :, index], context.positions) for index in (0, 1))
        return scaled(q, self.spec.key_size**-0.5), k, self.value(x), self._rates(context)

    def _rates(self, context: Context) -> jax.Array:
        """``log γ``, float32 ``[heads]``."""
        return jnp.log1p(-jnp.exp2(-5.0 - jnp.arange(self.spec.heads, dtype=jnp.float32)))

    def _normed(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return gated(self.norm(y.astype(jnp.float32)), self.gate(x), "silu")
