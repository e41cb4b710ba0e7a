"""Mamba-2: the state space model whose decay is one number per head, so that it is linear attention (SSD)."""

from collections.abc import Iterator
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field, Strict

from efficient_lm.models.context import Context
from efficient_lm.models.layers.activations import Activation
from efficient_lm.models.layers.gated_norm import GatedNorm, Order
from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.layers.short_convolution import ShortConvolution
from efficient_lm.models.mixers.base import Cache, MixerSpec, dividing
from efficient_lm.models.mixers.recurrent import TIME_STEP, Implementation, documents, empty, entering, leaving
from efficient_lm.models.parameters import ONES, Initialization, Uniform, parameter
from efficient_lm.spec import Count, Listing, PerLayer, Positive, Real
from kernels_pallas.linear_attention import linear_attention

HEAD_SIZE = 64
"""Values per head where neither their number nor their size is given."""


class Mamba2Spec(MixerSpec):
    """State space duality (Dao & Gu 2024, arXiv 2405.21060, sections 6 and 7), per head with values of `head_size`:

    ``S_t = exp(Δ_t A) S_{t-1} + B_t (Δ_t u_t)ᵀ``, ``y_t = S_tᵀ C_t + D u_t``, then ``W_o (rms(y_t silu(z_t)) w)``,

    with ``u, B, C = silu(convolution(W_u x, W_B x, W_C x))``, ``z = W_z x``, ``Δ = softplus(W_Δ x + b)`` and
    ``A = -exp(A_log)``. The heads of a group share B and C, and the norm is over a group's values together. It starts
    as published: -A uniform between 1 and 16, ``D = 1``, b such that Δ is log-uniform between 0.001 and 0.1.

    Attributes:
        expand: inner values as a multiple of width, unless `heads` and `head_size` say how many there are.
        heads: None has as many as `head_size` (64, unless given) goes into the inner values.
        head_size: values per head; None takes inner values / `heads`.
        groups: of heads that share B and C.
        state_size: values of B and of C.
        convolution: taps.
        convolution_bias: whether the convolution has a bias.
        activation: after the convolution.
        bias, output_bias: biases of the maps that read x, and of W_o.
        norm: ``gate_first`` as above, ``norm_first``: ``rms(y) w silu(z)``, None: ``y silu(z)`` (Falcon-H1).
        norm_epsilon: of that norm, if there is one.
        dt_limit: least and largest Δ; no largest if null.
        multipliers: constant factors of z, u, B, C and Δ as they leave their maps (Falcon-H1).
        chunk_size, implementation: see `kernels_pallas.linear_attention`.
    """

    kind: Literal["mamba2"] = "mamba2"
    expand: PerLayer[Positive] = 2.0
    heads: PerLayer[Count | None] = None
    head_size: Count | None = None
    groups: Count = 1
    state_size: PerLayer[Count] = 128
    convolution: Count = 4
    convolution_bias: bool = True
    activation: Activation = "silu"
    bias: bool = False
    output_bias: bool = False
    norm: Order | None = "gate_first"
    norm_epsilon: Positive = 1e-5
    dt_limit: Annotated[tuple[Annotated[Real, Field(ge=0)], Positive | None], Strict(False)] = (0.0, None)
    multipliers: Annotated[Listing[Real], Field(min_length=5, max_length=5)] | None = None
    chunk_size: Count | None = None
    implementation: Implementation = "auto"

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        heads, inner = self.head_count(width), round(self.expand * width)
        if not (self.heads and self.head_size) and self.inner_size(width) != inner:
            key, number = ("head_size", self.head_size) if self.head_size else ("heads", heads)
            yield key, f"{number} does not divide the {inner} inner values; {dividing(inner, number)}"
        if heads % self.groups:
            yield "groups", f"{self.groups} do not divide {heads} heads; {dividing(heads, self.groups)}"
        low, high = self.dt_limit
        if high is not None and high < low:
            yield "dt_limit", f"its least value {low} is above its largest, {high}: give the least first"

    def head_count(self, width: int) -> int:
        """Heads in a model of this width."""
        return self.heads or max(1, round(self.expand * width) // (self.head_size or HEAD_SIZE))

    def size_per_head(self, width: int) -> int:
        """Values per head in a model of this width."""
        return self.head_size or max(1, round(self.expand * width) // self.head_count(width))

    def inner_size(self, width: int) -> int:
        """Inner values in a model of this width."""
        return self.head_count(width) * self.size_per_head(width)

    def resolved(self, width: int) -> "Mamba2Spec":
        sizes = {"heads": self.head_count(width), "head_size": self.size_per_head(width)}
        unread = {} if self.norm else {"norm_epsilon": type(self).model_fields["norm_epsilon"].default}
        return self.model_copy(update={**sizes, **unread, "expand": self.inner_size(width) / width})

    def counted(self) -> dict[str, tuple[str, ...]]:
        heads = ("groups", "heads") if self.groups > 1 else ("heads",)
        return {"heads": heads, "state": ("state_size",)}

    def laid_along(self) -> dict[str, tuple[str, ...]]:
        # One group is every head's.
        return super().laid_along() | ({} if self.groups > 1 else {"heads": ("heads",)})

    def build(self, width: int, init: Initialization) -> nnx.Module:
        return Mamba2(self, width, init)

    def flops_per_token(self, width: int, context_length: int) -> float:
        """Projections, convolution, and the recurrence token by token: 5 operations per entry of the state.

        Of these, one decays, two add what the token writes, and two read.
        """
        inner, states = self.inner_size(width), 2 * self.groups * self.state_size
        read = 2 * inner + states + self.head_count(width)
        recurrence = 5.0 * inner * self.state_size
        return 2.0 * width * (read + inner) + 2.0 * self.convolution * (inner + states) + recurrence


class Mamba2(nnx.Module):
    def __init__(self, spec: Mamba2Spec, width: int, init: Initialization):
        self.spec = spec
        embed, heads = {"embed": width}, {"heads": spec.head_count(width)}
        values = {**heads, "head_dim": spec.size_per_head(width)}
        states = {"input_output": 2, "groups": spec.groups, "state": spec.state_size}
        self.gate_input = Linear(embed, {"gate_input": 2, **values}, init=init, bias=spec.bias, batch=1)
        self.input_output = Linear(embed, states, init=init, bias=spec.bias, batch=1)
        self.dt = Linear(embed, heads, init=init, bias=spec.bias)
        self.convolution, self.input_output_convolution = (
            ShortConvolution(
                axes, spec.convolution, bias=spec.convolution_bias, activation=spec.activation,
                implementation=spec.implementation,
            )
            for axes in (values, states)
        )  # fmt: skip
        self.dt_bias = parameter(heads, TIME_STEP)
        self.A_log = parameter(heads, Uniform(1.0, 16.0, jnp.log))
        self.D = parameter(heads, ONES)
        self.norm = spec.norm and GatedNorm(
            values, over=2, order=spec.norm, epsilon=spec.norm_epsilon, groups=spec.groups
        )
        self.output = Linear(values, embed, init=init, bias=spec.output_bias, residual=True)

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """`x [batch, time, width]` → the same shape and dtype, and the cache after these tokens."""
        ids, start = documents(context, cache), entering(cache, context)
        pair, states = self._scaled(self.gate_input(x), 0, 2), self._scaled(self.input_output(x), 2, 4)
        u, convolved = self.convolution(pair[..., 1, :, :], ids, start.get("convolution"))
        states, states_convolved = self.input_output_convolution(states, ids, start.get("input_output_convolution"))
        dt, wide = self._step(x), u.astype(jnp.float32)
        y, state = linear_attention(
            states[..., 1, :, :], states[..., 0, :, :], (wide * dt[..., None]).astype(x.dtype), self._decay(dt),
            segment_ids=ids, initial_state=start.get("state"), chunk_size=self.spec.chunk_size,
            implementation=self.spec.implementation,
        )  # fmt: skip
        y = self._gated(y + self.D[...][:, None] * wide, pair[..., 0, :, :])
        new = {"state": state, "convolution": convolved, "input_output_convolution": states_convolved}
        return self.output(y), leaving(cache, context, **new)

    def _scaled(self, x: jax.Array, first: int, last: int) -> jax.Array:
        """`x [batch, time, matrices, ...]`, each of its matrices' outputs times its constant factor."""
        if self.spec.multipliers is None:
            return x
        factors = jnp.asarray(self.spec.multipliers[first:last]).reshape(-1, *[1] * (x.ndim - 3))
        return (x.astype(jnp.float32) * factors).astype(x.dtype)

    def _step(self, x: jax.Array) -> jax.Array:
        """Δ, float32 ``[batch, time, heads]``."""
        raw = self.dt(x).astype(jnp.float32)
        raw = raw if self.spec.multipliers is None else raw * self.spec.multipliers[4]
        dt, (low, high) = jax.nn.softplus(raw + self.dt_bias[...]), self.spec.dt_limit
        return dt if low == 0 and high is None else jnp.clip(dt, low, high)

    def _decay(self, dt: jax.Array) -> jax.Array:
        return dt * -jnp.exp(self.A_log[...])

    def _gated(self, y: jax.Array, z: jax.Array) -> jax.Array:
        """float32 `y` and `z` ``[batch, time, heads, head_size]`` → the same shape, in the dtype of `z`."""
        if self.norm is None:
            return (y * jax.nn.silu(z.astype(jnp.float32))).astype(z.dtype)
        return self.norm(y, z)

    def log_decay(self, x: jax.Array, context: Context) -> jax.Array:
        """``Δ A``, float32 ``[batch, time, heads]``."""
        return self._decay(self._step(x))

    def init_cache(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
        """The state before any token; its size does not depend on `length`."""
        heads, size = self.convolution.channels
        return empty(
            batch,
            state=jnp.zeros((batch, heads, self.spec.state_size, size), jnp.float32),
            convolution=self.convolution.empty(batch, dtype),
            input_output_convolution=self.input_output_convolution.empty(batch, dtype),
        )
