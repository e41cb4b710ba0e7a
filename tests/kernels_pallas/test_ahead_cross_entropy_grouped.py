"""Grouped matmul and linear cross-entropy compiled for real machines: no spills, no waiting, memory within bounds."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.ahead import compile_ahead
from kernels_pallas.grouped_matmul import grouped_matmul

pytestmark = pytest.mark.slow
TPUS = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
GROUPED = {
    "8 experts": (8192, 8, 4096, 14336, jnp.bfloat16),
    "64 small experts": (16384, 64, 2048, 1024, jnp.bfloat16),
    "float32": (4096, 8, 768, 3072, jnp.float32),
}


def grouped(x, w, sizes, pull):
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation="pallas"), x, w)
    return y, *back(pull)


def grouped_arguments(case):
    rows, groups, inputs, outputs, dtype = GROUPED[case]
    shapes = [(rows, inputs), (groups, inputs, outputs), (groups,), (rows, outputs)]
    dtypes = [dtype, jnp.float32 if dtype == jnp.float32 else jnp.bfloat16, jnp.int32, dtype]
    return [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]


@pytest.mark.parametrize("case", GROUPED)
def test_grouped_matmul_for_hopper(case):
    kernels = compile_ahead(grouped, grouped_arguments(case), "h200").kernels
    assert len(kernels) == 3
    for kernel in kernels:
        assert kernel.spilled_bytes == 0 and not kernel.serialized
        assert kernel.blocks_per_multiprocessor >= 2


@pytest.mark.parametrize("topology", TPUS)
@pytest.mark.parametrize("case", GROUPED)
def test_grouped_matmul_for_tpus(case, topology):
    assert compile_ahead(grouped, grouped_arguments(case), topology).peak_bytes < 16e9
