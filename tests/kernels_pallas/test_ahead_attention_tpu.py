"""The fused TPU kernels of attention and their gradients compile for TPUs that are not there."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.ahead import compile_ahead
from kernels_pallas.attention import attention

SHAPES = {  # batch, time, heads, groups, key width, value width
    "130M": (2, 2048, 12, 12, 64, 64),
    "350M": (2, 4096, 16, 4, 64, 64),
    "1.5B": (1, 16384, 16, 4, 128, 128),
    "wide": (1, 8192, 8, 1, 256, 256),
    "latent": (1, 4096, 16, 16, 192, 128),
}
TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]


def compiled(topology, shape, dtype=jnp.bfloat16, packed=False, sinks=False, **options):
    batch, time, heads, groups, width, value_width = SHAPES[shape]
    sizes = {"q": (heads, width), "k": (groups, width), "v": (groups, value_width)}
    values = {name: jax.ShapeDtypeStruct((batch, time, *size), dtype) for name, size in sizes.items()}
    learned = {"sinks": jax.ShapeDtypeStruct((heads,), jnp.float32)} if sinks else {}
    ids = {"segment_ids": jax.ShapeDtypeStruct((batch, time), jnp.int32)} if packed else {}

    def total(values, ids):
        return jnp.sum(attention(**values, **ids, **options, implementation="pallas").astype(jnp.float32))

    return compile_ahead(jax.grad(total), (values | learned, ids), topology)


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_compile(topology, shape):
    program = compiled(topology, shape).program.as_text()
    assert all(f"attention_{part}" in program for part in ("forward", "query_gradient", "key_gradient"))


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_options_compile(topology):
    options = {"packed": True, "sinks": True, "window": 1024, "kept": 4, "softcap": 30.0}
    assert "attention_key_gradient" in compiled(topology, "350M", **options).program.as_text()


@pytest.mark.slow
def test_float32_compiles():
    assert "attention_key_gradient" in compiled("v5p:2x2x1", "130M", jnp.float32, packed=True).program.as_text()


@pytest.mark.slow
def test_no_logits_are_kept():
    batch, time, heads = SHAPES["1.5B"][:3]
    assert compiled("v5p:2x2x1", "1.5B").temporary_bytes < 0.1 * 2 * batch * heads * time**2
