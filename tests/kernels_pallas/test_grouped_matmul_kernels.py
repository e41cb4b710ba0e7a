"""Grouped matmul by kernels, in the simulators of both targets: against NumPy, and lowered for real ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.grouped_matmul.tiles import tiles, with_rest
from kernels_pallas.target import Target, compiling_for, simulating

CASES = {
    "bfloat16, odd sizes": (jnp.bfloat16, (101, 70, 130), [30, 0, 50, 0]),
    "float32, few rows": (jnp.float32, (9, 24, 8), [0, 5, 1]),
    "float32, all in one of two": (jnp.float32, (150, 64, 64), [0, 150]),
}
BOUNDS = {jnp.bfloat16: (5e-3, 8e-3, 1e-5), jnp.float32: (1e-5, 1e-4, 1e-4)}
pytestmark = pytest.mark.usefixtures("without_races")


def inputs(dtype, shape, groups, w_dtype=jnp.float32):
    generator = np.random.default_rng(0)
    rows, width, outputs = shape
    values = [generator.normal(size=size) for size in ((rows, width), (groups, width, outputs), (rows, outputs))]
    return [jnp.asarray(value, kind) for value, kind in zip(values, (dtype, w_dtype, dtype), strict=True)]


def training(x, w, pull, sizes, tile=None):
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, tile=tile, implementation="pallas"), x, w)
    return y, *back(pull)


def simulated(platform, *arguments, **options):
    with simulating(platform):
        return jax.jit(functools.partial(training, **options))(*arguments)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(platform, case, error, in_groups):
    dtype, shape, sizes = CASES[case]
    x, w, pull = inputs(dtype, shape, len(sizes))
    x, pull = (value.at[sum(sizes) :].set(jnp.nan) for value in (x, pull))  # what these hold reaches nothing
    got = simulated(platform, x, w, pull, jnp.asarray(sizes), tile=64)
    wanted = in_groups(x, w, pull, sizes)
    assert [value.dtype for value in got] == [dtype, dtype, jnp.float32]
    for value, exact, bound in zip(got, wanted, BOUNDS[dtype], strict=True):
        assert error(value, exact) < bound


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("sizes", [[1] * 9 + [200], [129, 7, 128, 8, 0], [300, 30, 4], [0, 0]])
def test_more_sizes(platform, tile, sizes, error, in_groups):
    x, w, pull = inputs(jnp.bfloat16, (300, 136, 72), len(sizes), jnp.bfloat16)
    got = simulated(platform, x, w, pull, jnp.asarray(sizes), tile=tile)
    ends = np.minimum(np.cumsum(sizes), 300)  # groups end where the rows do
    for value, exact in zip(got, in_groups(x, w, pull, np.diff(ends, prepend=0)), strict=True):
        assert error(value, exact) < 8e-3


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_the_same_bits_twice(platform):
    arguments = *inputs(jnp.bfloat16, (70, 64, 64), 2), jnp.array([33, 30])
    for once, again in zip(simulated(platform, *arguments), simulated(platform, *arguments), strict=True):
        np.testing.assert_array_equal(np.asarray(once, np.float32), np.asarray(again, np.float32))


@pytest.mark.parametrize("alignment", [1, 8, 16])
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("sizes", [[5, 0, 40, 3], [0, 0, 0], [64, 0], [16, 32, 16, 0, 9]])
def test_tiles_cover_every_row_once(alignment, every, sizes):
    parts = tiles(16, 64, with_rest(64, jnp.asarray(sizes)), alignment=alignment, every=every)
    count = int(parts.count)
    assert count <= len(parts.rows)
    rows, starts, ends, groups = (np.asarray(value)[:count] for value in parts[:4])
    own = [row for i in range(count) for row in range(max(rows[i], starts[i]), min(rows[i] + 16, ends[i]))]
    assert own == list(range(64))
    assert np.all(rows % alignment == 0) or alignment == 1
    assert np.all(np.diff(groups) >= 0)
    assert not every or set(groups) == set(range(len(sizes) + 1))


def shapes(dtype, rows=8192, groups=8, width=4096, outputs=14336):
    sizes = (rows, width), (groups, width, outputs), (rows, outputs)
    return *(jax.ShapeDtypeStruct(size, dtype) for size in sizes), jax.ShapeDtypeStruct((groups,), jnp.int32)


NAMES = ["grouped_matmul", "grouped_matmul_transposed", "grouped_matmul_weights"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_lowering_for_hopper(dtype, lowered_for_hopper):
    program = lowered_for_hopper(training, *shapes(dtype))
    assert program.count("mosaic_gpu") >= 3


@pytest.mark.parametrize("target", [Target("gpu", "NVIDIA H200", hopper=True), Target("tpu", "TPU v5")])
def test_the_gradient_is_made_of_our_kernels(target):
    with compiling_for(target):
        program = str(jax.make_jaxpr(training)(*shapes(jnp.bfloat16)))
    assert all(f"name={name}\n" in program or f"name={name} " in program for name in NAMES), program


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((4, 3), np.float64)}, "x of dtype float64"),
        ({"x": np.zeros((0, 3), np.float32), "group_sizes": np.zeros(2, np.int32)}, "an empty array"),
    ],
)
def test_what_kernels_cannot_do_is_refused(changes, message):
    arguments = {"x": np.zeros((4, 3), np.float32), "w": np.zeros((2, 3, 5), np.float32)}
    with simulating("gpu"), pytest.raises(ValueError, match=message):
        grouped_matmul(**arguments | {"group_sizes": np.array([1, 2])} | changes, implementation="pallas")


def test_a_processor_runs_no_kernel():
    x, w, _ = inputs(jnp.float32, (4, 3, 5), 2)
    with pytest.raises(ValueError, match="Pallas kernels run on TPUs and on NVIDIA Hopper GPUs"):
        grouped_matmul(x, w, jnp.array([1, 2]), implementation="pallas")
