"""tokamax's ragged product; an optional package."""

import importlib
import importlib.util

import jax
import jax.numpy as jnp


def obstacles() -> list[str]:
    """Why tokamax cannot run, in words; empty if it can."""
    absent = importlib.util.find_spec("tokamax") is None
    return ["calls where the package tokamax is not installed"] * absent


def grouped_matmul(x, w, group_sizes) -> jax.Array:
    """x [M,K], w [E,K,N], group_sizes [E] → [M,N] in x's dtype."""
    y = importlib.import_module("tokamax").ragged_dot(x, w.astype(x.dtype), group_sizes.astype(jnp.int32))
    # What it leaves in rows of no group is not said to be zero.
    owned = jnp.arange(x.shape[0]) < jnp.sum(group_sizes)
    return jnp.where(owned[:, None], y, 0).astype(x.dtype)
