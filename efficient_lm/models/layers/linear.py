"""Linear maps between named axes."""

import math
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from efficient_lm.models.layers.groups import Groups, spread
from efficient_lm.models.parameters import ZEROS, Initialization, parameter
from kernels_pallas.partition import kept_apart, several, whole_over_rows
from kernels_pallas.target import current

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
    return dy @ w.T, _turned(x, (1, 0)) @ dy


def _turned(x: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """`x` with its axes in another order."""
    # XLA on CPUs is slow at products that contract the rows of the left operand: there the transpose is made first.
    turned = jnp.transpose(x, order)
    return jax.lax.optimization_barrier(turned) if current().platform == "cpu" else turned


matmul.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def divided_matmul(x: jax.Array, w: jax.Array, axes: tuple[str, ...], inputs: int) -> jax.Array:
    """`x [..., *inputs]` times `w [*inputs, *outputs]` on several devices, in the dtype of `x` → ``[..., *outputs]``.

    The weight is gathered where it is needed, after it is rounded, and gathered again in the backward pass rather than
    kept; its gradient is summed where the weight lives. No axis that devices may divide is merged with another.

    Args:
        axes: the logical ones of `w`.
        inputs: how many of them are inputs.
    """
    return _divided_forward(x, w, axes, inputs)[0]


def _divided_forward(
    x: jax.Array, w: jax.Array, axes: tuple[str, ...], inputs: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    over = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
    return jax.lax.dot_general(x, whole_over_rows(w.astype(x.dtype), axes), (over, ((), ()))), (x, w)


def _divided_backward(
    axes: tuple[str, ...], inputs: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    lead = x.ndim - inputs
    over = tuple(range(lead, dy.ndim)), tuple(range(inputs, w.ndim))
    dx = jax.lax.dot_general(dy, whole_over_rows(w.astype(x.dtype), axes), (over, ((), ())))
    turned = _turned(x, (*range(lead, x.ndim), *range(lead)))
    dw = jax.lax.dot_general(turned, dy, ((tuple(range(inputs, x.ndim)), tuple(range(lead))), ((), ())))
    return dx, kept_apart(dw, axes).astype(w.dtype)


divided_matmul.defvjp(_divided_forward, _divided_backward)


def product(x: jax.Array, w: jax.Array, axes: tuple[str, ...], inputs: int) -> jax.Array:
    """`divided_matmul` where there are several devices, on one `matmul`."""
    if several():
        return divided_matmul(x, w, axes, inputs)
    shape = x.shape[: x.ndim - inputs], w.shape[inputs:]
    size = math.prod(w.shape[:inputs])
    return matmul(x.reshape(-1, size), w.astype(x.dtype).reshape(size, -1)).reshape(*shape[0], *shape[1])


def by_head(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x [batch, time, heads, in]` times a matrix of each head, `w [heads, in, out]` → float32 ``[..., heads, out]``.

    The operands are rounded to the dtype of `x`; products and sums are float32.
    """
    # XLA on CPUs has no such product of bfloat16 into float32; in float32 the products of rounded operands are exact.
    rounded = w.astype(x.dtype).astype(jnp.float32)
    return jnp.einsum("bthd,hde->bthe", x.astype(jnp.float32), rounded)


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
        self.axes = (*inputs, *outputs)
        self.weight = parameter({**stack, **inputs, **outputs}, start, decay=True, matrix=matrix)
        self.bias = parameter({**stack, **outputs}, ZEROS) if bias else None

    def __call__(self, x: jax.Array, groups: Groups | None = None) -> jax.Array:
        """`x [..., *inputs]` → `[..., *outputs]`, same dtype; with groups, `[rows, *inputs]` → `[rows, *outputs]`."""
        y = self.product(x, self.weight[...], groups)
        rows = math.prod(x.shape[: x.ndim - len(self.input_shape)])
        return y if self.bias is None else y + spread(self.bias[...], groups, rows).astype(x.dtype)

    def product(self, x: jax.Array, weight: jax.Array, groups: Groups | None) -> jax.Array:
        """`x [..., *inputs]` times `weight [*inputs, *outputs]`, or their group's → ``[..., *outputs]``, same dtype."""
        if groups is None:
            return product(x, weight, self.axes, len(self.input_shape))
        rows = x.reshape(len(x), -1)
        done = groups.product(rows, weight.reshape(weight.shape[0], rows.shape[1], -1))
        return checkpoint_name(done, GROUPED).reshape(len(x), *self.output_shape)


class LowRank(nnx.Module):
    """``W↑ W↓ x + b``, through `rank` values."""

    def __init__(self, width: int, rank: int, outputs: Mapping[str, int], *, init: Initialization, bias: bool = False):
        self.down = Linear({"embed": width}, {"rank": rank}, init=init)
        self.up = Linear({"rank": rank}, outputs, init=init, bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [..., width]` → `[..., *outputs]`, same dtype."""
        return self.up(self.down(x))
