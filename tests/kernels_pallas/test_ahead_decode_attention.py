"""Decode attention compiles for Hopper GPUs, in registers and shared memory that suffice, and for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.ahead import compile_ahead, devices
from kernels_pallas.decode_attention import decode_attention

SHAPES = {  # batch, heads, groups, width, slots
    "130M": (8, 12, 12, 64, 2048),
    "1.5B": (32, 32, 8, 128, 32768),
    "wide": (1, 8, 1, 256, 16384),
}


def compiled(topology, shape, time=1, page=None, hidden=False, **options):
    batch, heads, groups, width, slots = SHAPES[shape]
    lead = (batch, slots) if page is None else (batch * slots // page, page)
    values = {name: jax.ShapeDtypeStruct((*lead, groups, width), jnp.bfloat16) for name in "kv"}
    values["q"] = jax.ShapeDtypeStruct((batch, time, heads, width), jnp.bfloat16)
    values["lengths"] = jax.ShapeDtypeStruct((batch,), jnp.int32)
    if page is not None:
        values["page_table"] = jax.ShapeDtypeStruct((batch, slots // page), jnp.int32)
    if hidden:
        values["visible"] = jax.ShapeDtypeStruct((batch, slots), jnp.bool_)

    def decode(values):
        return decode_attention(**values, **options, implementation="pallas")

    return compile_ahead(decode, (values,), topology)


OPTIONS = {
    "plain": {},
    "pages": {"page": 16},
    "all": {"time": 2, "page": 64, "hidden": True, "window": 1024, "softcap": 30.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_hopper(shape, options):
    (kernel,) = compiled("h200", shape, **OPTIONS[options]).kernels
    assert kernel.spilled_bytes == 0
    assert not kernel.serialized
    assert kernel.blocks_per_multiprocessor >= (1 if shape == "wide" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("shape", ["130M", "wide"])
@pytest.mark.parametrize("options", OPTIONS)
def test_tpus(topology, shape, options):
    assert "decode_attention" in compiled(topology, shape, **OPTIONS[options]).program.as_text()


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["h200", "v5p:2x2x1"])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_cache_is_not_copied(topology, options):
    batch, _, groups, width, slots = SHAPES["1.5B"]
    keys = 2 * batch * slots * groups * width
    assert compiled(topology, "1.5B", **OPTIONS[options]).temporary_bytes < 0.02 * keys


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["h200:1x4", "v5e:2x2"])
def test_devices_decode_their_own_rows_and_heads(topology):
    mesh = Mesh(np.asarray(devices(topology)).reshape(2, 2), ("data", "tensor"))

    def shaped(*shape, dtype=jnp.bfloat16, axes=("data", None, "tensor")):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    cache = [shaped(4, 1024, 8, 128)] * 2
    values = shaped(4, 1, 16, 128), *cache, shaped(4, dtype=jnp.int32, axes=("data",))

    def decode(*values):
        return decode_attention(*values, implementation="pallas")

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = compile_ahead(decode, values, topology, mesh).program.as_text()
    assert "all-gather" not in program
    assert "all-to-all" not in program
