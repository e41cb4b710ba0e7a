"""Solving the unit lower triangular systems of the delta rule by substitution in blocks.

A product form of the inverse, (I - A)(I + A²)(I + A⁴)..., loses everything when keys are nearly parallel: its factors
are huge and cancel. Here it is used for runs of 4 tokens alone; runs of 8 and 16 are merged from halves, and blocks of
16 are substituted one after the other.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 16

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def solve(system: jax.Array, right: jax.Array) -> jax.Array:
    """u with (I + system) u = right; system [..., C, C] strictly lower triangular, right [..., C, V], 16 divides C."""
    return _forward(system, right)[0]


def _forward(system, right):
    inverses = _inverses(system)
    return (u := _substitute(system, inverses, right)), (system, inverses, u)


def _backward(residuals, du):
    system, inverses, u = residuals
    dright = _substitute(system.swapaxes(-1, -2), inverses.swapaxes(-1, -2), du, upwards=True)
    below = np.tri(system.shape[-1], k=-1, dtype=bool)
    return jnp.where(below, -(dright @ u.swapaxes(-1, -2)), 0), dright


solve.defvjp(_forward, _backward)


def _inverses(system):
    """[..., C // 16, 16, 16]: the inverses of the blocks on the diagonal of I + system."""
    count = system.shape[-1] // BLOCK
    blocks = system.reshape(*system.shape[:-2], count, BLOCK, count, BLOCK)
    blocks = jnp.stack([blocks[..., i, :, i, :] for i in range(count)], axis=-3)
    token = np.arange(BLOCK)
    runs = {size: token[:, None] // size == token // size for size in (4, 8, 16)}
    eye = jnp.eye(BLOCK, dtype=system.dtype)
    smallest = jnp.where(runs[4], blocks, 0)
    inverses = _matmul(eye - smallest, eye + _matmul(smallest, smallest))
    for size in (8, 16):
        between = jnp.where(runs[size] & ~runs[size // 2], blocks, 0)
        inverses -= _matmul(_matmul(inverses, between), inverses)
    return inverses


def _substitute(system, inverses, right, *, upwards=False):
    """Block by block; the system is upper triangular if `upwards`."""
    count = system.shape[-1] // BLOCK
    solved = None
    for i in reversed(range(count)) if upwards else range(count):
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        rest = right[..., rows, :]
        if solved is not None:
            known = slice((i + 1) * BLOCK, None) if upwards else slice(0, i * BLOCK)
            rest -= _matmul(system[..., rows, known], solved)
        part = _matmul(inverses[..., i, :, :], rest)
        parts = [part] if solved is None else [part, solved] if upwards else [solved, part]
        solved = jnp.concatenate(parts, axis=-2)
    return solved
