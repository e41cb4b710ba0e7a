"""Matrix states over chunks on Hopper GPUs, in the interpreter: against plain JAX, with and without corrections."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.chunk_states import chunk_states, plain

BOUNDS = {"0": 5e-3, "1": 5e-3, "dwhole": 2e-2}  # of bfloat16 products; the other gradients 8e-3
CORRECTED = pytest.mark.parametrize("corrected", [False, True], ids=["added", "corrected"])


def arguments(batch, chunks, heads, keys, values, *, corrected, fill=None):
    """Arrays of `chunk_states` with random values, or of the function `fill` of a shape and a dtype."""
    generator = np.random.default_rng(0)

    def normal(shape, dtype):
        return jnp.asarray(generator.normal(size=shape) / 4, dtype)

    fill = fill or normal
    rows, bfloat16 = (batch, chunks * 64, heads), jnp.bfloat16
    given = {
        "q_in": fill((*rows, keys), bfloat16),
        "k_out": fill((*rows, keys), bfloat16),
        "pairs": fill((batch, chunks, heads, 64, 64), bfloat16),
        "v": fill((*rows, values), bfloat16),
        "whole": fill((batch, chunks, heads, keys), jnp.float32),
        "state": fill((batch, heads, keys, values), jnp.float32),
    }
    return given | {"w": fill((*rows, keys), bfloat16)} if corrected else given


def lower(function, pairs, **others):
    return function(pairs=jnp.tril(pairs), **others)


@CORRECTED
def test_equals_plain_jax(results, error, without_races, corrected):
    given = arguments(1, 3, 2, 64, 128, corrected=corrected)
    given["whole"] = jnp.abs(given["whole"]).at[:, 1, 0].set(0)
    if corrected:
        given["w"] /= 4
    kernel = functools.partial(lower, functools.partial(chunk_states, simulated=True))
    got = results(kernel, given)
    wanted = results(functools.partial(lower, plain.chunk_states), given)

    assert all(error(got[name], wanted[name]) < BOUNDS.get(name, 8e-3) for name in wanted)


@pytest.mark.slow
@CORRECTED
def test_the_same_bits_twice(results, corrected):
    given = arguments(1, 2, 2, 64, 64, corrected=corrected)
    first, second = (results(functools.partial(chunk_states, simulated=True), given) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@CORRECTED
def test_lowers_for_hopper_with_kernels_in_the_gradient(lowered_for_hopper, corrected):
    given = arguments(8, 32, 16, 128, 128, corrected=corrected, fill=jax.ShapeDtypeStruct)

    def loss(given):
        o, state = chunk_states(**given)
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(state)

    gradient = jax.grad(loss)
    program = str(jax.make_jaxpr(gradient)(given))
    assert all(name in program for name in ("chunk_states_advance_back", "chunk_states_read_turned"))
    # Without outputs to read in the forward pass: states there, states back, and what reads them.
    assert lowered_for_hopper(gradient, given).count("custom_call @mosaic_gpu") == (6 if corrected else 5)
