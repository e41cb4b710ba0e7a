"""Elementwise functions by name."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp


def relu(x: jax.Array) -> jax.Array:
    """``max(x, 0)``."""
    return jnp.maximum(x, 0)


def relu_squared(x: jax.Array) -> jax.Array:
    """``max(x, 0) ** 2`` (So et al. 2021, Primer)."""
    return jnp.square(relu(x))


def quick_gelu(x: jax.Array) -> jax.Array:
    """``x * sigmoid(1.702 x)`` (Hendrycks & Gimpel 2016, section 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


def identity(x: jax.Array) -> jax.Array:
    """``x``."""
    return x


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "identity": identity,
    "quick_gelu": quick_gelu,
    "relu": relu,
    "relu_squared": relu_squared,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}

Activation = Literal[tuple(ACTIVATIONS)]
"""Name of an activation."""
