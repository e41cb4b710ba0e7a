"""Kimi delta attention: the delta rule with a decay per channel of the keys."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.models.context import Context
from efficient_lm.models.layers.gated_norm import GatedNorm
from efficient_lm.models.layers.linear import LowRank
from efficient_lm.models.mixers.delta_rule import DeltaRule, DeltaRuleSpec
from efficient_lm.models.mixers.recurrent import TIME_STEP
from efficient_lm.models.parameters import Initialization, Uniform, parameter
from efficient_lm.spec import Count


class KDASpec(DeltaRuleSpec):
    """The delta rule with ``D_t = diag(α_t)`` (Kimi team 2025, arXiv 2510.26692, eq. 1 and 9),

    ``log α_t = -exp(A_log) softplus(W_f↑ W_f↓ x_t + dt_bias)`` with A_log per head and dt_bias per channel, and
    ``W_o (rms(y) * w * sigmoid(W_z↑ W_z↓ x))``. Heads have 128 keys and as many values. A starts uniform between 1 and
    16, dt_bias as in gated DeltaNet.

    Attributes:
        rank: of the maps of the decay and of the gate; None takes `value_size`.
    """

    kind: Literal["kda"] = "kda"
    rank: Count | None = None

    def resolved(self, width: int) -> "KDASpec":
        sizes = super().resolved(width)
        return sizes.model_copy(update={"rank": self.rank or sizes.value_size})

    def counted(self) -> dict[str, tuple[str, ...]]:
        return super().counted() | {"rank": ("rank",)}

    def build(self, width: int, init: Initialization) -> nnx.Module:
        return KDA(self, width, init)

    def flops_per_token(self, width: int, context_length: int) -> float:
        """As without a gate and a decay, with their maps, and one operation per entry of the state that decays."""
        sizes = self.resolved(width)
        own = 2.0 * sizes.rank * (2 * width + sizes.heads * (sizes.key_size + sizes.value_size))
        own += sizes.heads * sizes.key_size * sizes.value_size
        return super().flops_per_token(width, context_length) + own


class KDA(DeltaRule):
    def __init__(self, spec: KDASpec, width: int, init: Initialization):
        super().__init__(spec, width, init)
        heads, rank = {"heads": self.spec.heads}, self.spec.rank
        channels = {**heads, "state": self.spec.key_size}
        self.decay = LowRank(width, rank, channels, init=init)
        self.gate = LowRank(width, rank, self.values, init=init)
        self.A_log = parameter(heads, Uniform(1.0, 16.0, jnp.log))
        self.dt_bias = parameter(channels, TIME_STEP)
        self.norm = GatedNorm(self.values, activation="sigmoid", epsilon=spec.epsilon, shared=True)

    def log_decay(self, x: jax.Array, context: Context) -> jax.Array:
        """``log α``, float32 ``[batch, time, heads, key_size]``."""
        step = jax.nn.softplus(self.decay(x).astype(jnp.float32) + self.dt_bias[...])
        return -jnp.exp(self.A_log[...])[:, None] * step

    def _decay(self, x: jax.Array, context: Context) -> jax.Array:
        return self.log_decay(x, context)

    def _normed(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return self.norm(y, self.gate(x))
