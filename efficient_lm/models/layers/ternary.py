"""Linear maps whose weights are -1, 0 or 1 and whose inputs are whole numbers of eight bits."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from efficient_lm.models.layers.linear import Linear, matmul
from efficient_lm.models.layers.norms import RMSNormSpec

LEVELS = 127
"""Largest input, in steps."""

LEAST = 1e-5
"""The mean size of weights, and the largest input, count as at least this."""


class TernaryLinear(Linear):
    """``y = s_w s_x (T X)`` with ``X = round(norm(x) / s_x)``, ``T = clip(round(W / s_w), -1, 1)``.

    ``s_x = max |norm(x)| / 127`` for each token, ``s_w = mean |W|`` for each matrix; gradients pass both roundings as
    if they were not there (Ma et al. 2024, arXiv 2402.17764, eq. 1 to 3; Zhu et al. 2024, arXiv 2406.02528, section
    3.2). The norm, over all inputs, is part of the map. Parameters, and the norm, are float32; X and T are exact in
    bfloat16. Arguments are those of `Linear`.
    """

    def __init__(self, inputs: Mapping[str, int], outputs: Mapping[str, int], *, batch: int = 0, **options: Any):
        super().__init__(inputs, outputs, batch=batch, **options)
        self.norm = RMSNormSpec(epsilon=1e-8).build(inputs)
        batched = range(len(inputs), len(inputs) + batch)
        self.matrix_axes = tuple(axis for axis in range(len(inputs) + len(outputs)) if axis not in batched)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [..., *inputs]` → `[..., *outputs]`, same dtype."""
        lead = x.shape[: x.ndim - len(self.input_shape)]
        weight = self.weight[...]
        size = jnp.maximum(jnp.mean(jnp.abs(weight), axis=self.matrix_axes, keepdims=True), LEAST)
        ternary = rounded(weight, size, 1)
        rows = self.norm(x.astype(jnp.float32)).reshape(-1, math.prod(self.input_shape))
        step = jnp.maximum(jnp.max(jnp.abs(rows), axis=-1, keepdims=True), LEAST) / LEVELS
        y = matmul(rounded(rows, step, LEVELS).astype(x.dtype), ternary.astype(x.dtype).reshape(rows.shape[-1], -1))
        scale = jax.lax.stop_gradient(jnp.broadcast_to(size, (*(1,) * len(self.input_shape), *self.output_shape)))
        y = y.astype(jnp.float32) * jax.lax.stop_gradient(step) * scale.reshape(1, -1)
        y = y.reshape(*lead, *self.output_shape)
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


def rounded(x: jax.Array, step: jax.Array, largest: int) -> jax.Array:
    """The nearest whole number of steps, at most `largest` of them; with the gradient of ``x / step`` in `x` alone."""
    exact = x / jax.lax.stop_gradient(step)
    whole = jnp.clip(jnp.round(exact), -largest, largest)
    return exact + jax.lax.stop_gradient(whole - exact)
