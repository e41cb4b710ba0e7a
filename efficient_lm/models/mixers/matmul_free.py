"""The token mixer of the MatMul-free language model: a gated recurrence between ternary maps."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.models.context import Context
from efficient_lm.models.layers.ternary import TernaryLinear
from efficient_lm.models.mixers.base import Cache, MixerSpec
from efficient_lm.models.mixers.recurrent import Implementation, documents, empty, entering, leaving
from efficient_lm.models.parameters import Initialization
from efficient_lm.spec import Count, PerLayer, Positive
from kernels_pallas.linear_recurrence import linear_recurrence


class MatMulFreeSpec(MixerSpec):
    """``W_o (sigmoid(W_g x) * h)`` with ``h_t = f_t h_{t-1} + (1 - f_t) silu(W_c x_t)``, ``f_t = sigmoid(W_f x_t)``,

    every W ternary and its inputs of eight bits (Zhu et al. 2024, arXiv 2406.02528, section 3.3, MLGRU). A block of the
    published model has it before a ``swiglu`` that is ternary too.

    Attributes:
        expand: inner channels as a multiple of width.
        inner: inner channels, instead of `expand`.
        bias: whether the maps have biases.
        chunk_size, implementation: see `kernels_pallas.linear_recurrence`.
    """

    kind: Literal["matmul_free"] = "matmul_free"
    expand: Positive = 1.0
    inner: PerLayer[Count | None] = None
    bias: bool = False
    chunk_size: Count | None = None
    implementation: Implementation = "auto"

    def inner_size(self, width: int) -> int:
        """Inner channels in a model of this width."""
        return self.inner or max(1, round(self.expand * width))

    def resolved(self, width: int) -> "MatMulFreeSpec":
        inner = self.inner_size(width)
        return self.model_copy(update={"inner": inner, "expand": inner / width})

    def counted(self) -> dict[str, tuple[str, ...]]:
        return {"heads": ("inner",)}

    def build(self, width: int, init: Initialization) -> nnx.Module:
        return MatMulFree(self, width, init)

    def flops_per_token(self, width: int, context_length: int) -> float:
        """Maps, counted as if their products were no additions, and two operations per channel for the recurrence."""
        return 2.0 * self.inner_size(width) * (4 * width + 1)


class MatMulFree(nnx.Module):
    def __init__(self, spec: MatMulFreeSpec, width: int, init: Initialization):
        self.spec, self.inner = spec, spec.inner_size(width)
        embed, inner = {"embed": width}, {"inner": self.inner}
        self.branches = TernaryLinear(embed, {"branch": 3, **inner}, init=init, bias=spec.bias, batch=1)
        self.output = TernaryLinear(inner, embed, init=init, bias=spec.bias, residual=True)

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """`x [batch, time, width]` → the same shape and dtype, and the cache after these tokens."""
        branches = self.branches(x)
        forget, candidate, gate = (branches[..., index, :].astype(jnp.float32) for index in range(3))
        h, state = linear_recurrence(
            jax.nn.log_sigmoid(forget), (jax.nn.sigmoid(-forget) * jax.nn.silu(candidate)).astype(x.dtype),
            segment_ids=documents(context, cache), initial_state=entering(cache, context).get("state"),
            chunk_size=self.spec.chunk_size, implementation=self.spec.implementation,
        )  # fmt: skip
        return self.output((jax.nn.sigmoid(gate) * h).astype(x.dtype)), leaving(cache, context, state=state)

    def log_decay(self, x: jax.Array, context: Context) -> jax.Array:
        """``log f``, float32 ``[batch, time, inner]``."""
        return jax.nn.log_sigmoid(self.branches(x)[..., 0, :].astype(jnp.float32))

    def init_cache(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
        """The state, float32 ``[batch, inner]``, of one size for any length."""
        return empty(batch, state=jnp.zeros((batch, self.inner), jnp.float32))
