"""Gated DeltaNet: the delta rule with a decay per head."""

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.models.context import Context
from efficient_lm.models.layers.gated_norm import GatedNorm
from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.mixers.delta_rule import DeltaRule, DeltaRuleSpec
from efficient_lm.models.mixers.recurrent import TIME_STEP
from efficient_lm.models.parameters import Initialization, Uniform, parameter


class GatedDeltaNetSpec(DeltaRuleSpec):
    """The delta rule with ``D_t = α_t`` (Yang et al. 2024, arXiv 2412.06464, eq. 10),

    ``log α_t = -exp(A_log) softplus(W_α x_t + dt_bias)``, and ``W_o (rms(y) * w * silu(W_z x))``. Heads have 256 keys
    and twice as many values; all keys together are three quarters of the width.

    A starts uniform between 0 and 16 (0.01, so that its logarithm is finite), and ``softplus(dt_bias)`` between 0.001
    and 0.1, uniform in the logarithm, as in Mamba-2.
    """

    usual_head: ClassVar[int] = 256
    key_share: ClassVar[float] = 0.75
    value_share: ClassVar[float] = 2.0

    kind: Literal["gated_delta_net"] = "gated_delta_net"

    def build(self, width: int, init: Initialization) -> nnx.Module:
        return GatedDeltaNet(self, width, init)

    def flops_per_token(self, width: int, context_length: int) -> float:
        """As without a gate and a decay, with their maps, and one operation per entry of the state that decays."""
        sizes = self.resolved(width)
        own = 2.0 * width * sizes.heads * (sizes.value_size + 1) + sizes.heads * sizes.key_size * sizes.value_size
        return super().flops_per_token(width, context_length) + own


class GatedDeltaNet(DeltaRule):
    def __init__(self, spec: GatedDeltaNetSpec, width: int, init: Initialization):
        super().__init__(spec, width, init)
        heads = {"heads": self.spec.heads}
        self.gate = Linear({"embed": width}, self.values, init=init)
        self.decay = Linear({"embed": width}, heads, init=init)
        self.A_log = parameter(heads, Uniform(0.01, 16.0, jnp.log))
        self.dt_bias = parameter(heads, TIME_STEP)
        self.norm = GatedNorm(self.values, epsilon=spec.epsilon, shared=True)

    def log_decay(self, x: jax.Array, context: Context) -> jax.Array:
        """``log α``, float32 ``[batch, time, heads]``."""
        step = jax.nn.softplus(self.decay(x).astype(jnp.float32) + self.dt_bias[...])
        return -jnp.exp(self.A_log[...]) * step

    def _decay(self, x: jax.Array, context: Context) -> jax.Array:
        return self.log_decay(x, context)

    def _normed(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return self.norm(y, self.gate(x))
