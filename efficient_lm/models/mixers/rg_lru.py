"""The recurrent block of Griffin and RecurrentGemma: a gated recurrence with one number of state per channel."""

from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.models.context import Context
from efficient_lm.models.layers.activations import ACTIVATIONS, Activation
from efficient_lm.models.layers.linear import Linear, by_head
from efficient_lm.models.layers.short_convolution import ShortConvolution
from efficient_lm.models.mixers.base import Cache, MixerSpec, dividing
from efficient_lm.models.mixers.recurrent import Implementation, documents, empty, entering, leaving
from efficient_lm.models.parameters import ZEROS, Initialization, Uniform, parameter
from efficient_lm.spec import Count, Positive
from kernels_pallas.linear_recurrence import linear_recurrence

SHARPNESS = 8.0
"""The constant c: a decay is the learned one to the power of c times the recurrence gate."""

STEEPEST = 1000.0
"""Slope that the square root of the input's factor keeps to; at a decay of 1 its own would be infinite."""


class RGLRUSpec(MixerSpec):
    """``W_o (gelu(W_y x) * h)`` with ``h`` the real-gated linear recurrent unit of ``u = convolution(W_x x)``:

    ``h_t = a_t h_{t-1} + sqrt(1 - a_t²) (i_t u_t)``, ``a_t = exp(-c softplus(Λ) r_t)`` with c = 8,
    ``r_t = sigmoid(G_r u_t + b_r)``, ``i_t = sigmoid(G_i u_t + b_i)``, G block-diagonal; a document's first token has 1
    for the square root (De et al. 2024, arXiv 2402.19427, section 2.4 and appendix A). Λ starts so that
    ``exp(-c softplus(Λ))`` is uniform between 0.9 and 0.999.

    Attributes:
        expand: inner channels as a multiple of width, rounded to a multiple of `heads`.
        inner: inner channels, instead of `expand`.
        heads: blocks of G.
        convolution: taps.
        activation: of the branch that gates the output.
        bias: whether W_x, W_y and W_o have biases; the convolution and the gates always do.
        chunk_size, implementation: see `kernels_pallas.linear_recurrence`.
    """

    kind: Literal["rg_lru"] = "rg_lru"
    expand: Positive = 4 / 3
    inner: Count | None = None
    heads: Count = 16
    convolution: Count = 4
    activation: Activation = "gelu_tanh"
    bias: bool = True
    chunk_size: Count | None = None
    implementation: Implementation = "auto"

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        if self.inner and self.inner % self.heads:
            yield "heads", f"{self.heads} do not divide {self.inner} inner channels; {dividing(self.inner, self.heads)}"

    def inner_size(self, width: int) -> int:
        """Inner channels in a model of this width."""
        return self.inner or max(1, round(self.expand * width / self.heads)) * self.heads

    def resolved(self, width: int) -> "RGLRUSpec":
        inner = self.inner_size(width)
        return self.model_copy(update={"inner": inner, "expand": inner / width})

    def counted(self) -> dict[str, tuple[str, ...]]:
        return {"heads": ("heads", "inner")}

    def build(self, width: int, init: Initialization) -> nnx.Module:
        return RGLRU(self, width, init)

    def flops_per_token(self, width: int, context_length: int) -> float:
        """Projections, convolution, gates, and two operations per channel for the recurrence itself."""
        inner = self.inner_size(width)
        gates = 2 * inner // self.heads
        return 2.0 * inner * (3 * width + self.convolution + gates + 1)


def lambda_of_decay(strongest: jax.Array) -> jax.Array:
    """Λ whose decay under an open gate, ``exp(-c softplus(Λ))``, is the given one."""
    return jnp.log(jnp.expm1(-jnp.log(strongest) / SHARPNESS))


@jax.custom_vjp
def bounded_root(x: jax.Array) -> jax.Array:
    """The square root, whose slope is bounded where `x` comes to zero."""
    return jnp.sqrt(x)


def _root_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sqrt(x), x


def _root_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    return (dy / jnp.sqrt(jnp.maximum(4.0 * x, STEEPEST**-2)),)


bounded_root.defvjp(_root_forward, _root_backward)


class BlockDiagonal(nnx.Module):
    """``y_h = x_h @ W_h + b_h`` for each head by itself; float32 out of products in the dtype of `x`."""

    def __init__(self, heads: int, size: int, init: Initialization):
        axes = {"heads": heads, "head_dim": size, "gate_dim": size}
        self.weight = parameter(axes, init.matrix(size), decay=True, matrix=((1,), (2,)))
        self.bias = parameter({"heads": heads, "gate_dim": size}, ZEROS)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [batch, time, heads, size]` → float32 of the same shape."""
        return by_head(x, self.weight[...]) + self.bias[...]


class RGLRU(nnx.Module):
    def __init__(self, spec: RGLRUSpec, width: int, init: Initialization):
        self.spec, self.inner = spec, spec.inner_size(width)
        embed, size = {"embed": width}, self.inner // spec.heads
        inner = {"heads": spec.heads, "head_dim": size}
        self.branches = Linear(embed, {"branch": 2, **inner}, init=init, bias=spec.bias, batch=1)
        self.convolution = ShortConvolution(
            inner, spec.convolution, bias=True, activation="identity", implementation=spec.implementation
        )
        self.input_gate = BlockDiagonal(spec.heads, size, init)
        self.recurrence_gate = BlockDiagonal(spec.heads, size, init)
        self.decay = parameter(inner, Uniform(0.9, 0.999, lambda_of_decay))
        self.output = Linear(inner, embed, init=init, bias=spec.bias, residual=True)

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """`x [batch, time, width]` → the same shape and dtype, and the cache after these tokens."""
        start, segments = entering(cache, context), documents(context, cache)
        both = self.branches(x)
        u, convolved = self.convolution(both[..., 1, :, :], segments, start.get("convolution"))
        log_decay = self._log_decay(u)
        h, state = linear_recurrence(
            log_decay.reshape(*x.shape[:2], self.inner),
            self._inputs(u, log_decay, context.positions).reshape(*x.shape[:2], self.inner),
            segment_ids=segments, initial_state=start.get("state"),
            chunk_size=self.spec.chunk_size, implementation=self.spec.implementation,
        )  # fmt: skip
        gate = ACTIVATIONS[self.spec.activation](both[..., 0, :, :])
        y = self.output(gate * h.reshape(gate.shape))
        return y, leaving(cache, context, state=state, convolution=convolved)

    def _log_decay(self, u: jax.Array) -> jax.Array:
        return -SHARPNESS * jax.nn.softplus(self.decay[...]) * jax.nn.sigmoid(self.recurrence_gate(u))

    def _inputs(self, u: jax.Array, log_decay: jax.Array, positions: jax.Array) -> jax.Array:
        """What the recurrence adds, in the dtype of `u`: gated, and scaled so that the state keeps its variance."""
        kept = bounded_root(-jnp.expm1(2 * log_decay))
        factor = jnp.where((positions == 0)[..., None, None], 1.0, kept)
        return (u * jax.nn.sigmoid(self.input_gate(u)) * factor).astype(u.dtype)

    def log_decay(self, x: jax.Array, context: Context) -> jax.Array:
        """Logarithm of the decay, float32 ``[batch, time, heads, head_dim]``."""
        return self._log_decay(self.convolution(self.branches(x)[..., 1, :, :], documents(context, None), None)[0])

    def init_cache(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
        """The state, float32 ``[batch, inner]``, and what the convolution still needs; of one size for any length."""
        state = jnp.zeros((batch, self.inner), jnp.float32)
        return empty(batch, state=state, convolution=self.convolution.empty(batch, dtype))
