"""Dense channel mixers: the plain MLP and the gated ones."""

from functools import partial
from statistics import NormalDist
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from pydantic import Field

from efficient_lm.models.auxiliary import Auxiliary
from efficient_lm.models.context import Context
from efficient_lm.models.ffns.base import FFNSpec
from efficient_lm.models.layers.activations import ACTIVATIONS, Activation
from efficient_lm.models.layers.groups import Groups
from efficient_lm.models.layers.linear import Linear, scaled
from efficient_lm.models.layers.ternary import TernaryLinear
from efficient_lm.models.parameters import Initialization
from efficient_lm.spec import Count, PerLayer, Positive, Real


class DenseSpec(FFNSpec):
    """What the dense channel mixers share. Each kind has an `activation`: a choice, or its own.

    Attributes:
        expansion: hidden units as a multiple of width.
        hidden: hidden units, instead of `expansion`.
        bias: whether the linear maps have biases.
        output_multiplier: constant factor of the result.
        ternary: whether the maps' weights are -1, 0 or 1, and their inputs normed and of eight bits.
        sparsity: about which part of a token's units is zero in front of the activation (see `sparse`); 0: as they are.
    """

    gated: ClassVar[bool] = False
    expansion: PerLayer[Positive]
    hidden: PerLayer[Count | None] = None
    bias: bool = False
    output_multiplier: Positive = 1.0
    ternary: bool = False
    sparsity: PerLayer[Annotated[Real, Field(ge=0, lt=1)]] = 0.0

    def hidden_size(self, width: int) -> int:
        """Hidden units in a model of this width; an `expansion` is rounded to a multiple of 8."""
        return self.hidden or max(8, round(self.expansion * width / 8) * 8)

    def resolved(self, width: int) -> "DenseSpec":
        hidden = self.hidden_size(width)
        return self.model_copy(update={"hidden": hidden, "expansion": hidden / width})

    def counted(self) -> dict[str, tuple[str, ...]]:
        return {"ffn": ("hidden",)}

    def build(self, width: int, init: Initialization, experts: int | None = None) -> "Dense":
        """The module; with `experts`, so many of them in one, for `Dense.transformed` of rows in groups."""
        return Dense(self, width, init, experts)

    def flops_per_token(self, width: int) -> float:
        return 2.0 * width * self.hidden_size(width) * (3 if self.gated else 2)


class GatedSpec(DenseSpec):
    """What the gated ones share besides; `gate_multiplier` is a constant factor of the gate before its activation."""

    gated: ClassVar[bool] = True
    expansion: PerLayer[Positive] = 8 / 3
    gate_multiplier: Positive = 1.0

    def units(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """The hidden units, of the two maps' results, which have the same shape and dtype."""
        return ACTIVATIONS[self.activation](gate) * up


class MLPSpec(DenseSpec):
    """``down(activation(up(x)))`` (Vaswani et al. 2017, eq. 2)."""

    kind: Literal["mlp"] = "mlp"
    expansion: PerLayer[Positive] = 4.0
    activation: Activation = "gelu"


class GLUSpec(GatedSpec):
    """``down(activation(gate(x)) * up(x))`` (Dauphin et al. 2017; Shazeer 2020, eq. 5)."""

    kind: Literal["glu"] = "glu"
    activation: Activation = "sigmoid"


class SwiGLUSpec(GatedSpec):
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020, eq. 6)."""

    activation: ClassVar[str] = "silu"
    kind: Literal["swiglu"] = "swiglu"


class GeGLUSpec(GatedSpec):
    """``down(gelu(gate(x)) * up(x))`` (Shazeer 2020, eq. 6); `approximate` takes the tanh form, as Gemma does."""

    kind: Literal["geglu"] = "geglu"
    approximate: bool = True

    @property
    def activation(self) -> str:
        """The form of GELU that `approximate` names."""
        return "gelu_tanh" if self.approximate else "gelu"


class ReGLUSpec(GatedSpec):
    """``down(relu(gate(x)) * up(x))`` (Shazeer 2020, eq. 6)."""

    activation: ClassVar[str] = "relu"
    kind: Literal["reglu"] = "reglu"


class ClampedSwiGLUSpec(GatedSpec):
    """``down(g sigmoid(slope g) (u + 1))``, ``g = min(gate(x), limit)``, ``u = clip(up(x), ±limit)`` (gpt-oss)."""

    kind: Literal["clamped_swiglu"] = "clamped_swiglu"
    slope: Positive = 1.702
    limit: Positive = 7.0

    def units(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.slope * gate) * (up + 1)


class Dense(nnx.Module):
    def __init__(self, spec: DenseSpec, width: int, init: Initialization, experts: int | None = None):
        hidden, embed = {"mlp": spec.hidden_size(width)}, {"embed": width}
        linear = partial(TernaryLinear if spec.ternary else Linear, init=init, bias=spec.bias, experts=experts)
        self.spec = spec
        if spec.gated:
            # One matmul for both halves: the input is read once.
            self.gate_up = linear(embed, {"gate_up": 2, **hidden}, batch=1)
        else:
            self.up = linear(embed, hidden)
        self.down = linear(hidden, embed, residual=True)

    def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, Auxiliary]:
        """`x [batch, time, width]` → the same shape and dtype, and nothing auxiliary."""
        return self.transformed(x), Auxiliary()

    def transformed(self, x: jax.Array, groups: Groups | None = None) -> jax.Array:
        """`x [..., width]` → the same shape and dtype; of several experts, `[rows, width]` in groups, one for each."""
        return scaled(self.down(self.hidden(x, groups), groups), self.spec.output_multiplier)

    def hidden(self, x: jax.Array, groups: Groups | None = None) -> jax.Array:
        """What the last map reads, `[..., hidden]`."""
        spec = self.spec
        if not spec.gated:
            up = checkpoint_name(self.up(x, groups), "ffn_hidden")
            return ACTIVATIONS[spec.activation](sparse(up, spec.sparsity))
        both = checkpoint_name(self.gate_up(x, groups), "ffn_hidden")
        gate = scaled(both[..., 0, :], spec.gate_multiplier)
        return spec.units(sparse(gate, spec.sparsity), both[..., 1, :])


def sparse(units: jax.Array, sparsity: float) -> jax.Array:
    """``max(u - (mean(u) + q std(u)), 0)``, q the normal distribution's quantile of `sparsity`, over the last axis.

    Of units that are normally distributed, that part is zero: the largest stay, found without sorting (Spark
    Transformer, You et al. 2025, arXiv 2506.06644). Same shape and dtype; `units` themselves for a sparsity of 0.
    """
    if sparsity == 0.0:
        return units
    wide = units.astype(jnp.float32)
    mean, variance = jnp.mean(wide, -1, keepdims=True), jnp.var(wide, -1, keepdims=True)
    # Above zero: the root has no slope there, and units that are all alike are no reason to have none.
    cutoff = mean + NormalDist().inv_cdf(sparsity) * jnp.sqrt(jnp.maximum(variance, 1e-30))
    return jnp.maximum(wide - cutoff, 0.0).astype(units.dtype)
