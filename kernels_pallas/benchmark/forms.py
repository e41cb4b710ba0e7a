"""The forms of a call that are measured: its function of arrays, forward or with gradients, by an implementation."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from kernels_pallas.benchmark.cases import Case

Arrays = Mapping[str, jax.Array]


def forward(case: Case, implementation: str) -> Callable[[Arrays], object]:
    """The operator's outputs, of named arrays."""

    def run(arrays: Arrays):
        return case.call.function(**arrays, **case.options(), implementation=implementation)

    return run


def training(function: Callable[[Arrays], object]) -> Callable[[Arrays], object]:
    """Outputs, and gradients of every float array, of the sum of all outputs weighted by fixed numbers."""

    def run(arrays: Arrays):
        floats = {name: value for name, value in arrays.items() if jnp.issubdtype(value.dtype, jnp.floating)}
        rest = {name: value for name, value in arrays.items() if name not in floats}

        def loss(floats):
            outputs = function({**floats, **rest})
            return sum(_weighted(x, place) for place, x in enumerate(jax.tree.leaves(outputs))), outputs

        (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(floats)
        return outputs, gradients

    return run


def _weighted(value: jax.Array, place: int) -> jax.Array:
    """A sum whose gradient is different everywhere, and cheap to make."""
    weights = jnp.cos(jnp.arange(value.shape[-1], dtype=jnp.float32) + place) if value.ndim else 1.0
    return jnp.sum(value.astype(jnp.float32) * weights)


@functools.cache
def compiled(case: Case, implementation: str, with_gradients: bool) -> Callable[[Arrays], object]:
    """The jitted form."""
    function = forward(case, implementation)
    return jax.jit(training(function) if with_gradients else function)
