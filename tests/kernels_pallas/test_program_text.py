"""What a program reads and writes, counted from its text; what it multiplies, counted from its trace."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.ahead.products import product_flops
from kernels_pallas.ahead.program_text import ProgramText, size
from kernels_pallas.ahead.traffic import traffic

LAYERS, ROWS, WIDTH = 7, 32, 64
WEIGHTS = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
INPUT = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)

PROGRAM = """HloModule step

%slices (whole: f32[10,8], more: f32[8]) -> f32[8] {
  %whole = f32[10,8]{1,0} parameter(0)
  %more = f32[8]{0} parameter(1)
  %view = f32[10,8]{1,0} bitcast(%whole)
  %one = f32[1,8]{1,0} dynamic-slice(%view, %zero, %zero), dynamic_slice_sizes={1,8}
  %flat = f32[8]{0} bitcast(%one)
  ROOT %sum = f32[8]{0} add(%flat, %more)
}

%writes (array: f32[10,8], row: f32[1,8]) -> f32[10,8] {
  %array = f32[10,8]{1,0} parameter(0)
  %row = f32[1,8]{1,0} parameter(1)
  ROOT %new = f32[10,8]{1,0} dynamic-update-slice(%array, %row, %zero, %zero)
}

%body (p: (s32[], f32[10,8])) -> (s32[], f32[10,8]) {
  %p = (s32[], f32[10,8]{1,0}) parameter(0)
  %stack = f32[10,8]{1,0} get-tuple-element(%p), index=1
  %bias = f32[8]{0} constant({...})
  %read = f32[8]{0} fusion(%stack, %bias), kind=kLoop, calls=%slices
  %kept = f32[8]{0:T(256)S(1)} negate(%read)
  %back = f32[1,8]{1,0} bitcast(%kept)
  %written = f32[10,8]{1,0} fusion(%stack, %back), kind=kLoop, calls=%writes
  ROOT %out = (s32[], f32[10,8]{1,0}) tuple(%index, %written)
}

ENTRY %main (x: f32[10,8]) -> f32[10,8] {
  %x = f32[10,8]{1,0} parameter(0)
  %loop = (s32[], f32[10,8]{1,0}) while(%begin), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %y = f32[10,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_reads_and_writes_one_row_at_a_time():
    """The row and the bias in, the sum out; the sum in, its negation stays in vector memory; the row out."""
    row = 8 * 4
    assert traffic(ProgramText(PROGRAM)) == 5 * ((2 + 1) * row + row + 2 * row)
    assert size("f32[8]{0:T(256)S(1)}") == 32 and size("f32[8]{0:T(256)S(1)}", main_memory=True) == 0
    assert size("(bf16[2,3]{1,0}, pred[], s4[8])") == 12 + 1 + 4


def unrolled(weights, x):
    for layer in range(LAYERS):
        x = jnp.tanh(x @ weights[layer])
    return jnp.sum(x)


def test_without_loops_the_count_is_the_compilers(optimized):
    program = jax.jit(jax.grad(unrolled)).lower(WEIGHTS, INPUT).compile()
    assert traffic(ProgramText(program.as_text())) == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.01)


def test_products_of_loops_recomputation_and_conditions():
    def scanned(weights, x):
        layer = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))
        return jnp.sum(jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0])

    once = 2 * ROWS * WIDTH * WIDTH * LAYERS
    assert product_flops(jax.jit(scanned).trace(WEIGHTS, INPUT).jaxpr) == once
    # Forward, again for the backward pass, and the gradients of both factors.
    assert product_flops(jax.jit(jax.grad(scanned)).trace(WEIGHTS, INPUT).jaxpr) == 4 * once

    def either(weights, x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ weights[0], lambda: x)

    assert product_flops(jax.jit(either).trace(WEIGHTS, INPUT).jaxpr) == once / LAYERS


def test_products_of_convolutions_and_of_devices():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    shapes = jax.ShapeDtypeStruct((2, 16, 8), jnp.float32), jax.ShapeDtypeStruct((3, 8, 4), jnp.float32)
    assert product_flops(jax.jit(convolve).trace(*shapes).jaxpr) == 2 * (2 * 16 * 4) * (3 * 8)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()
    parted = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    assert product_flops(jax.jit(parted).trace(INPUT).jaxpr) == 2 * ROWS * ROWS * WIDTH
