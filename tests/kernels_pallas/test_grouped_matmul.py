"""Matmul of rows in groups: tiles against the definition, and both against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import grouped_matmul, xla

ROWS, INPUTS, OUTPUTS, GROUPS = 23, 5, 6, 4
SIZES = {
    "uneven": [7, 1, 10, 5],
    "empty first and last": [0, 20, 3, 0],
    "empty between": [11, 0, 0, 12],
    "all in one": [0, 0, 23, 0],
    "rows of no group": [4, 0, 9, 3],
    "nothing": [0, 0, 0, 0],
}
FORMS = {"reference": {}, "xla, tiles of 3": {"tile": 3}, "xla, a tile for all": {"tile": 64}, "auto": {}}


def inputs(dtype=np.float64):
    generator = np.random.default_rng(0)
    shapes = (ROWS, INPUTS), (GROUPS, INPUTS, OUTPUTS), (ROWS, OUTPUTS)
    return [generator.normal(size=shape).astype(dtype) for shape in shapes]


@functools.cache
def computed(implementation, tile=None):
    """One program for all sizes: y, dx and dw."""

    @jax.jit
    def run(x, w, pull, sizes):
        y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, tile=tile, implementation=implementation), x, w)
        return y, *back(pull)

    return run


def of_form(form):
    return computed(form.split(",")[0], **FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients_in_float64(form, sizes, in_groups):
    with jax.enable_x64(True):
        x, w, pull = inputs()
        # What rows of no group hold reaches nothing.
        x[sum(sizes) :] = np.nan
        got = of_form(form)(x, w, pull, jnp.asarray(sizes))
    for value, wanted in zip(got, in_groups(x, w, pull, sizes), strict=True):
        assert value.dtype == np.float64
        np.testing.assert_allclose(value, wanted, atol=1e-12)


@pytest.mark.parametrize("form", ["reference", "xla, tiles of 3"])
def test_narrow_rows_with_a_float32_matrix(form, in_groups):
    x, w, pull = inputs(np.float32)
    x, pull = jnp.asarray(x, jnp.bfloat16), jnp.asarray(pull, jnp.bfloat16)
    w = np.asarray(jnp.asarray(w, jnp.bfloat16), np.float32)
    got = of_form(form)(x, w, pull, jnp.asarray(SIZES["uneven"]))
    assert [value.dtype for value in got] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    wide = (np.asarray(value, np.float64) for value in (x, w, pull))
    for value, wanted, bound in zip(got, in_groups(*wide, SIZES["uneven"]), (8e-3, 8e-3, 1e-6), strict=True):
        np.testing.assert_allclose(np.asarray(value, np.float64), wanted, atol=bound * np.abs(wanted).max())


def test_the_matrix_gradient_accumulates_in_float32():
    """A group of many tiles, all adding the same: a bfloat16 sum would stop growing."""
    x, w, pull = jnp.ones((1024, 1), jnp.bfloat16), jnp.zeros((1, 1, 1)), jnp.ones((1024, 1), jnp.bfloat16)
    assert float(computed("xla", 1)(x, w, pull, jnp.array([1024]))[2][0, 0, 0]) == 1024


def test_groups_end_where_the_rows_do(in_groups):
    x, w, pull = inputs(np.float32)
    got = of_form("xla, tiles of 3")(x, w, pull, jnp.array([20, 30, 4, 0]))
    for value, wanted in zip(got, in_groups(x, w, pull, [20, 3, 0, 0]), strict=True):
        np.testing.assert_allclose(value, wanted, atol=1e-5)


@functools.cache
def temporary(groups, inputs, outputs):
    """Bytes besides arguments and results of the gradients with 2048 rows."""
    shapes = [(2048, inputs), (groups, inputs, outputs), (2048, outputs)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    return computed("xla", 64).lower(*arguments, sizes).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_groups_times_rows():
    few, many = temporary(4, 16, 32), temporary(64, 16, 32)
    assert many - few <= 2 * 60 * 4 * 16 * 32
    assert many < 4 * 64 * 2048 * 16, "not even the rows of every group's own"


@pytest.mark.parametrize("groups", [1, 3, 8, 500])
def test_tiles_are_no_larger_than_groups_need(groups):
    assert 8 <= xla.default_tile(1000, groups, "cpu") <= max(8, 1000 // groups)


def changed(**changes):
    x, w, _ = inputs(np.float32)
    arguments = {"x": x, "w": w, "group_sizes": jnp.array(SIZES["uneven"])} | changes
    return lambda: grouped_matmul(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((2, ROWS, INPUTS))}, r"x must be \[rows, inputs\]"),
        ({"w": np.zeros((GROUPS, 9, OUTPUTS))}, "w must have shape"),
        ({"group_sizes": jnp.array([1, 2])}, "group_sizes must have shape"),
        ({"group_sizes": jnp.ones(GROUPS)}, "group_sizes must be integers"),
        ({"group_sizes": jnp.array([1, -1, 2, 0])}, "group_sizes must be at least 0"),
        ({"group_sizes": jnp.array([20, 1, 2, 1])}, "24 rows in groups, but x has 23"),
        ({"tile": 0}, "tile must be at least 1"),
        ({"tile": 4, "implementation": "reference"}, "cannot honour tile"),
        ({"implementation": "ragged"}, "no implementation 'ragged'"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        changed(**changes)()
