"""Mamba (S6): a diagonal state space model whose step, input and output projections depend on the token."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.models.context import Context
from efficient_lm.models.layers.activations import Activation
from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.layers.norms import NormSpec
from efficient_lm.models.layers.short_convolution import ShortConvolution
from efficient_lm.models.mixers.base import Cache, MixerSpec
from efficient_lm.models.mixers.recurrent import TIME_STEP, Implementation, documents, empty, entering, leaving
from efficient_lm.models.parameters import ONES, Initialization, Normal, Pattern, Uniform, parameter
from efficient_lm.spec import Count, OneOf, PerLayer, Positive
from kernels_pallas.selective_scan import selective_scan


class MambaSpec(MixerSpec):
    """The selective state space model of Gu & Dao 2023 (arXiv 2312.00752, algorithm 2 and section 3.4), per channel:

    ``h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t``, ``y_t = C_t · h_t + D u_t``, then ``W_o (y_t silu(z_t))``,

    with ``u = silu(convolution(W_x x))``, ``z = W_z x``, ``B, C = W_B u, W_C u`` shared by all channels,
    ``Δ = softplus(W_up W_down u + b)`` and ``A = -exp(A_log)``. It starts as published: ``A = -(1, ..., state_size)``,
    ``D = 1``, W_up uniform within ``±rank^-0.5`` and b such that Δ is log-uniform between 0.001 and 0.1.

    Attributes:
        expand: inner channels as a multiple of width.
        inner: inner channels, instead of `expand`.
        state_size: values of the state per channel.
        rank: of the map to Δ; None takes ``ceil(width / 16)``.
        convolution: taps.
        convolution_bias: whether the convolution has a bias.
        activation: after the convolution.
        bias, output_bias: biases of W_x and W_z, and of W_o.
        inner_norm: norm of ``W_down u``, B and C, each by itself (FalconMamba: without a scale; Jamba: with one).
        selective: whether Δ, B and C depend on the token. False learns one Δ per channel, one B and one C instead: the
            linear time-invariant model that the paper's ablations compare with, all else equal.
        chunk_size, implementation: see `kernels_pallas.selective_scan`.
    """

    kind: Literal["mamba"] = "mamba"
    expand: PerLayer[Positive] = 2.0
    inner: PerLayer[Count | None] = None
    state_size: PerLayer[Count] = 16
    rank: PerLayer[Count | None] = None
    convolution: Count = 4
    convolution_bias: bool = True
    activation: Activation = "silu"
    bias: bool = False
    output_bias: bool = False
    inner_norm: OneOf[NormSpec] | None = None
    selective: bool = True
    chunk_size: Count | None = None
    implementation: Implementation = "auto"

    def inner_size(self, width: int) -> int:
        """Inner channels in a model of this width."""
        return self.inner or max(1, round(self.expand * width))

    def rank_size(self, width: int) -> int:
        """Rank of the map to Δ in a model of this width."""
        return self.rank or math.ceil(width / 16)

    def resolved(self, width: int) -> "MambaSpec":
        inner = self.inner_size(width)
        return self.model_copy(update={"inner": inner, "expand": inner / width, "rank": self.rank_size(width)})

    def counted(self) -> dict[str, tuple[str, ...]]:
        return {"heads": ("inner",), "state": ("state_size",), "rank": ("rank",)}

    def build(self, width: int, init: Initialization) -> nnx.Module:
        return Mamba(self, width, init)

    def flops_per_token(self, width: int, context_length: int) -> float:
        """Projections, convolution, and the recurrence token by token: 7 operations per channel and value of its state.

        Of these, one makes the exponent, one is the exponential, two decay and add, one makes the input, two read.
        """
        inner, rank = self.inner_size(width), self.rank_size(width)
        maps = rank + 2 * self.state_size + rank if self.selective else 0
        return 2.0 * inner * (3 * width + self.convolution + maps) + 7.0 * inner * self.state_size


def log_of_place(shape: tuple[int, ...]) -> jax.Array:
    """``log(1), log(2), ...`` along the last axis."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=jnp.float32)), shape)


class Mamba(nnx.Module):
    def __init__(self, spec: MambaSpec, width: int, init: Initialization):
        self.spec, self.inner_size = spec, spec.inner_size(width)
        embed, inner, state = {"embed": width}, {"inner": self.inner_size}, {"state": spec.state_size}
        self.input_gate = Linear(embed, {"input_gate": 2, **inner}, init=init, bias=spec.bias, batch=1)
        self.convolution = ShortConvolution(
            inner, spec.convolution, bias=spec.convolution_bias, activation=spec.activation,
            implementation=spec.implementation,
        )  # fmt: skip
        if spec.selective:
            self._build_selection(inner, {"rank": spec.rank_size(width)}, state, init)
        else:
            self.constants = parameter({"input_output": 2, **state}, Normal(1.0))
        self.dt_bias = parameter(inner, TIME_STEP)
        self.A_log = parameter({**inner, **state}, Pattern(log_of_place))
        self.D = parameter(inner, ONES)
        self.output = Linear(inner, embed, init=init, bias=spec.output_bias, residual=True)

    def _build_selection(
        self, inner: dict[str, int], rank: dict[str, int], state: dict[str, int], init: Initialization
    ) -> None:
        norm, bound = self.spec.inner_norm, rank["rank"] ** -0.5
        self.dt_down = Linear(inner, rank, init=init)
        self.input_output = Linear(inner, {"input_output": 2, **state}, init=init, batch=1)
        self.dt_up = parameter({**rank, **inner}, Uniform(-bound, bound), decay=True, matrix=((0,), (1,)))
        self.dt_norm, self.input_norm, self.output_norm = (norm and norm.build(axes) for axes in (rank, state, state))

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """`x [batch, time, width]` → the same shape and dtype, and the cache after these tokens."""
        ids, start = documents(context, cache), entering(cache, context)
        pair = self.input_gate(x)
        u, convolved = self.convolution(pair[..., 0, :], ids, start.get("convolution"))
        dt, B, C = self._selection(u)
        y, state = selective_scan(
            u, dt, self._rates(), B, C, self.D[...], segment_ids=ids, initial_state=start.get("state"),
            chunk_size=self.spec.chunk_size, implementation=self.spec.implementation,
        )  # fmt: skip
        gate = jax.nn.silu(pair[..., 1, :].astype(jnp.float32))
        y = self.output((y.astype(jnp.float32) * gate).astype(x.dtype))
        return y, leaving(cache, context, state=state, convolution=convolved)

    def _rates(self) -> jax.Array:
        """A, float32 ``[inner, state]``, below zero."""
        return -jnp.exp(self.A_log[...])

    def _selection(self, u: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Δ, float32 ``[batch, time, inner]``, and B and C ``[batch, time, state]``, of `u [batch, time, inner]`."""
        if not self.spec.selective:
            dt = jnp.broadcast_to(jax.nn.softplus(self.dt_bias[...]), u.shape)
            maps = jnp.broadcast_to(self.constants[...], (*u.shape[:2], *self.constants.shape))
            return dt, maps[..., 0, :], maps[..., 1, :]
        low, maps = self.dt_down(u), self.input_output(u)
        B, C = maps[..., 0, :], maps[..., 1, :]
        if self.dt_norm is not None:
            low, B, C = self.dt_norm(low), self.input_norm(B), self.output_norm(C)
        raised = jnp.matmul(low, self.dt_up[...].astype(u.dtype), preferred_element_type=jnp.float32)
        return jax.nn.softplus(raised + self.dt_bias[...]), B, C

    def log_decay(self, x: jax.Array, context: Context) -> jax.Array:
        """``Δ A``, float32 ``[batch, time, inner, state]``."""
        u, _ = self.convolution(self.input_gate(x)[..., 0, :], documents(context, None), None)
        return self._selection(u)[0][..., None] * self._rates()

    def init_cache(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
        """The state before any token; its size does not depend on `length`."""
        state = jnp.zeros((batch, self.inner_size, self.spec.state_size), jnp.float32)
        return empty(batch, state=state, convolution=self.convolution.empty(batch, dtype))
