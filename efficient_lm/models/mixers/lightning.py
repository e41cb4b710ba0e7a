"""Lightning attention: linear attention whose heads forget at fixed rates, the slower the deeper the layer."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from efficient_lm.models.context import Context
from efficient_lm.models.layers.activations import ACTIVATIONS, Activation
from efficient_lm.models.layers.norms import NormSpec, RMSNormSpec
from efficient_lm.models.mixers.fixed_decay import FixedDecay, FixedDecaySpec
from efficient_lm.models.mixers.matrix_state import gated
from efficient_lm.models.parameters import Initialization
from efficient_lm.spec import Count, OneOf


class LightningSpec(FixedDecaySpec):
    """``S_t = λ S_{t-1} + k_t v_tᵀ``, ``y_t = S_tᵀ q_t`` per head, and ``W_o (norm(y) * g(W_g x))``

    with ``q = f(W_q x)``, ``k = f(W_k x)``, ``v = f_v(W_v x)`` (Qin et al. 2023, TransNormerLLM, arXiv 2307.14995,
    section 3.1; MiniMax 2025, arXiv 2501.08313, section 2.2).

    Attributes:
        activation, value_activation, gate_activation: f, f_v and g.
        decay: what λ is in head h of H and layer l of L, both from 0. ``linear``: ``exp(-(8 h / H) (1 - l / L))``, of
            TransNormerLLM; ``geometric``: ``exp(-2 ** (-8 (h + 1) / H) (1 - l / (L - 1 + 1e-5) + 1e-5))``, of
            MiniMax-01.
        decay_heads: H; null takes `heads`, of which a smaller model keeps the first.
        position: how queries and keys turn in the model's first layer; in others the decay alone tells order.
        norm: of all heads together.
    """

    kind: Literal["lightning"] = "lightning"
    activation: Activation = "silu"
    value_activation: Activation = "identity"
    gate_activation: Activation = "identity"
    decay: Literal["linear", "geometric"] = "linear"
    decay_heads: Count | None = None
    norm: OneOf[NormSpec] = RMSNormSpec(scale=False)

    @property
    def goes_by_place(self) -> bool:
        return True

    def cut(self, units: Mapping[str, int]) -> "LightningSpec":
        return super().cut(units).model_copy(update={"decay_heads": self.decay_heads or self.heads})

    def build(self, width: int, init: Initialization) -> "Lightning":
        return Lightning(self, width, init)


class Lightning(FixedDecay):
    def __init__(self, spec: LightningSpec, width: int, init: Initialization):
        super().__init__(spec, width, init)
        self.norm = spec.norm.build(self.values)

    def _read(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        pair = ACTIVATIONS[self.spec.activation](self.query_key(x))
        # At position 0 nothing turns; the same program then serves every layer.
        positions = jnp.where(jnp.asarray(context.layer) == 0, context.positions, 0)
        q, k = (self.position.rotate(pair[:, :, index], positions) for index in (0, 1))
        return q, k, ACTIVATIONS[self.spec.value_activation](self.value(x)), self._rates(context)

    def _rates(self, context: Context) -> jax.Array:
        """``log λ``, float32 ``[heads]``."""
        head, layer = jnp.arange(self.spec.heads, dtype=jnp.float32), jnp.asarray(context.layer, jnp.float32)
        heads = self.spec.decay_heads or self.spec.heads
        if self.spec.decay == "linear":
            return -8 * head / heads * (1 - layer / context.layers)
        return -jnp.exp2(-8 * (head + 1) / heads) * (1 - layer / (context.layers - 1 + 1e-5) + 1e-5)

    def _normed(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return gated(self.norm(y.astype(jnp.float32)), self.gate(x), self.spec.gate_activation)
