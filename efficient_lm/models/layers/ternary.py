"""Linear maps whose weights are -1, 0 or 1 and whose inputs are whole numbers of eight bits."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from efficient_lm.models.layers.groups import Groups, spread
from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.layers.norms import RMSNorm, RMSNormSpec

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

    def __init__(
        self,
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
        *,
        batch: int = 0,
        experts: int | None = None,
        **options: Any,
    ):
        super().__init__(inputs, outputs, batch=batch, experts=experts, **options)
        self.norm = RMSNorm(RMSNormSpec(epsilon=1e-8), inputs, experts)
        first = 0 if experts is None else 1
        behind = first + len(inputs)
        self.matrix_axes = (*range(first, behind), *range(behind + batch, behind + len(outputs)))

    def __call__(self, x: jax.Array, groups: Groups | None = None) -> jax.Array:
        """`x [..., *inputs]` → `[..., *outputs]`, same dtype; with groups, `[rows, *inputs]` → `[rows, *outputs]`."""
        lead = x.shape[: x.ndim - len(self.input_shape)]
        weight, many = self.weight[...], math.prod(lead)
        size = jnp.maximum(jnp.mean(jnp.abs(weight), axis=self.matrix_axes, keepdims=True), LEAST)
        rows = self.norm(x.astype(jnp.float32), groups).reshape(many, -1)
        step = jnp.maximum(jnp.max(jnp.abs(rows), axis=-1, keepdims=True), LEAST) / LEVELS
        whole = rounded(rows, step, LEVELS).astype(x.dtype).reshape(many, *self.input_shape)
        y = self.product(whole, rounded(weight, size, 1), groups)
        # The sizes of matrices side by side, each as wide as the outputs.
        size = jnp.squeeze(size, self.matrix_axes[: len(self.input_shape)])
        size = jnp.broadcast_to(size, (*size.shape[: size.ndim - len(self.output_shape)], *self.output_shape))
        scale = jax.lax.stop_gradient(spread(size, groups, many))
        y = y.astype(jnp.float32) * scale
        y = (y.reshape(many, -1) * jax.lax.stop_gradient(step)).reshape(many, *self.output_shape)
        y = y if self.bias is None else y + spread(self.bias[...], groups, many)
        return y.astype(x.dtype).reshape(*lead, *self.output_shape)


def rounded(x: jax.Array, step: jax.Array, largest: int) -> jax.Array:
    """The nearest whole number of steps, at most `largest` of them; with the gradient of ``x / step`` in `x` alone."""
    exact = x / jax.lax.stop_gradient(step)
    whole = jnp.clip(jnp.round(exact), -largest, largest)
    return exact + jax.lax.stop_gradient(whole - exact)
