"""Grouped matmul and linear cross-entropy compiled for real machines: no spills, no waiting, memory within bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.ahead import compile_ahead, devices
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.linear_cross_entropy import linear_cross_entropy

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


@pytest.mark.parametrize("topology", ["h200:1x4", "v5e:2x2"])
def test_grouped_matmul_outside_of_a_map_has_all_rows(topology):
    """XLA for TPUs refuses a kernel under a mesh that is not mapped over it."""
    mesh = Mesh(np.asarray(devices(topology)), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        compiled = compile_ahead(grouped, grouped_arguments("float32"), topology, mesh)
    assert "f32[8,768,3072]" in compiled.program.as_text()


CROSS_ENTROPY = {
    "large": (16384, 4096, 131072, jnp.bfloat16, None),
    "softcap": (8192, 768, 50304, jnp.bfloat16, 30.0),
    "float32": (8192, 768, 50304, jnp.float32, 30.0),
}


def cross_entropy(case):
    """The loss and its gradient, and what they take."""
    tokens, width, vocabulary, dtype, softcap = CROSS_ENTROPY[case]

    def training(x, w, labels, weights):
        def loss(x, w):
            sums = linear_cross_entropy(x, w, labels, weights, softcap=softcap, implementation="pallas")
            return sums.loss_sum + 1e-4 * sums.z_loss_sum

        return jax.value_and_grad(loss, argnums=(0, 1))(x, w)

    shapes = [(tokens, width), (width, vocabulary), (tokens,), (tokens,)]
    dtypes = [dtype, jnp.float32, jnp.int32, jnp.float32]
    return training, [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]


@pytest.mark.parametrize("case", CROSS_ENTROPY)
def test_linear_cross_entropy_for_hopper(case):
    compiled = compile_ahead(*cross_entropy(case), "h200")
    assert len(compiled.kernels) == 2
    for kernel in compiled.kernels:
        assert kernel.spilled_bytes == 0 and not kernel.serialized
        assert kernel.blocks_per_multiprocessor >= 2
    tokens, _, vocabulary, dtype, _ = CROSS_ENTROPY[case]
    assert compiled.temporary_bytes < 4 * tokens * vocabulary / 5


@pytest.mark.parametrize("topology", TPUS)
@pytest.mark.parametrize("case", CROSS_ENTROPY)
def test_linear_cross_entropy_for_tpus(case, topology):
    compiled = compile_ahead(*cross_entropy(case), topology)
    tokens, _, vocabulary, dtype, _ = CROSS_ENTROPY[case]
    assert compiled.temporary_bytes < 4 * tokens * vocabulary / (3 if dtype == jnp.bfloat16 else 2)


def test_linear_cross_entropy_on_a_mesh_has_a_device_s_own_tokens():
    mesh = Mesh(np.asarray(devices("h200:1x4")).reshape(2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    training, arguments = cross_entropy("large")
    specs = P(("data", "fsdp")), P("fsdp"), P(("data", "fsdp")), P(("data", "fsdp"))
    placed = [
        jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, spec))
        for value, spec in zip(arguments, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        compiled = compile_ahead(training, placed, "h200:1x4", mesh)
    assert len(compiled.kernels) == 2
    assert "bf16[4096,4096]" in compiled.program.as_text() and "bf16[16384,4096]" not in compiled.program.as_text()
