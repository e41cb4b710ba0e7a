"""Linear maps between named axes."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from efficient_lm.models.layers.groups import Groups, spread
from efficient_lm.models.parameters import ZEROS, Initialization, parameter

GROUPED = "grouped_product"
"""Name for rematerialisation of products of rows with their group's weights, which are no plain matrix products."""


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x [n, in] @ w [in, out]`, with the weight gradient in the form that the backend is fast at."""
    return x @ w


def _forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ w, (x, w)


def _backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    # XLA on CPUs is slow at products that contract the rows of the left operand: there the transpose is made first.
    transposed = jax.lax.optimization_barrier(x.T) if jax.default_backend() == "cpu" else x.T
    return dy @ w.T, transposed @ dy


matmul.defvjp(_forward, _backward)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """`x` times a constant, which is not rounded to the dtype of `x` before; `x` itself for one."""
    return x if factor == 1.0 else (x.astype(jnp.float32) * factor).astype(x.dtype)


class Linear(nnx.Module):
    """``y[..., *outputs] = x[..., *inputs] @ w + b``, computed in the dtype of `x` with float32 parameters.

    Args:
        inputs, outputs: logical axis name → size, in order; the weight has all of them.
        batch: leading output axes that are separate matrices side by side (gate and up, key and value).
        residual: whether the map writes into the residual stream (and starts smaller with depth).
        experts: so many maps side by side, with a leading axis `experts`; the call then takes the groups of its rows.
    """

    def __init__(
        self,
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
        *,
        init: Initialization,
        bias: bool = False,
        batch: int = 0,
        residual: bool = False,
        experts: int | None = None,
    ):
        stack = {} if experts is None else {"experts": experts}
        fan_in = math.prod(inputs.values())
        first, behind = len(stack), len(stack) + len(inputs)
        matrix = (tuple(range(first, behind)), tuple(range(behind + batch, behind + len(outputs))))
        start = init.output(fan_in) if residual else init.matrix(fan_in)
        self.input_shape, self.output_shape = tuple(inputs.values()), tuple(outputs.values())
        self.weight = parameter({**stack, **inputs, **outputs}, start, decay=True, matrix=matrix)
        self.bias = parameter({**stack, **outputs}, ZEROS) if bias else None

    def __call__(self, x: jax.Array, groups: Groups | None = None) -> jax.Array:
        """`x [..., *inputs]` → `[..., *outputs]`, same dtype; with groups, `[rows, *inputs]` → `[rows, *outputs]`."""
        lead = x.shape[: x.ndim - len(self.input_shape)]
        rows = x.reshape(-1, math.prod(self.input_shape))
        y = self.product(rows, self.weight[...], groups).reshape(*lead, *self.output_shape)
        return y if self.bias is None else y + spread(self.bias[...], groups, len(rows)).astype(x.dtype)

    def product(self, rows: jax.Array, weight: jax.Array, groups: Groups | None) -> jax.Array:
        """`rows [rows, in]` times `weight [*inputs, *outputs]`, or their group's → ``[rows, out]``, same dtype."""
        if groups is None:
            return matmul(rows, weight.astype(rows.dtype).reshape(rows.shape[1], -1))
        matrices = weight.reshape(weight.shape[0], rows.shape[1], -1)
        return checkpoint_name(groups.product(rows, matrices), GROUPED)


class LowRank(nnx.Module):
    """``W↑ W↓ x + b``, through `rank` values."""

    def __init__(self, width: int, rank: int, outputs: Mapping[str, int], *, init: Initialization, bias: bool = False):
        self.down = Linear({"embed": width}, {"rank": rank}, init=init)
        self.up = Linear({"rank": rank}, outputs, init=init, bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [..., width]` → `[..., *outputs]`, same dtype."""
        return self.up(self.down(x))
