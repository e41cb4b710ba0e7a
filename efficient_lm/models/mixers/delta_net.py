"""DeltaNet: linear attention that overwrites what it holds under a key."""

from typing import Literal

import jax
from flax import nnx

from efficient_lm.models.layers.gated_norm import GatedNorm
from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.layers.norms import RMSNormSpec
from efficient_lm.models.mixers.delta_rule import DeltaRule, DeltaRuleSpec
from efficient_lm.models.parameters import Initialization


class DeltaNetSpec(DeltaRuleSpec):
    """The delta rule without decay (Yang et al. 2024, arXiv 2406.06484, section 2.2; Schlag et al. 2021).

    Each head's output is normed, and with `gate` multiplied by ``silu(W_z x)``. Heads have 128 keys and as many values.

    Attributes:
        gate: see above; the paper has none.
    """

    kind: Literal["delta_net"] = "delta_net"
    gate: bool = False

    def build(self, width: int, init: Initialization) -> nnx.Module:
        return DeltaNet(self, width, init)

    def flops_per_token(self, width: int, context_length: int) -> float:
        sizes = self.resolved(width)
        gate = 2.0 * width * sizes.heads * sizes.value_size if self.gate else 0.0
        return super().flops_per_token(width, context_length) + gate


class DeltaNet(DeltaRule):
    def __init__(self, spec: DeltaNetSpec, width: int, init: Initialization):
        super().__init__(spec, width, init)
        self.gate = Linear({"embed": width}, self.values, init=init) if spec.gate else None
        if spec.gate:
            self.norm = GatedNorm(self.values, epsilon=spec.epsilon, shared=True)
        else:
            self.norm = RMSNormSpec(epsilon=spec.epsilon).build({"head_dim": self.spec.value_size})

    def _normed(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return self.norm(y) if self.gate is None else self.norm(y, self.gate(x))
