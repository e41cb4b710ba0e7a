"""The attention kernels compiled for an H200 that is not there: no spilled registers, no serialised wgmma."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.ahead import compile_ahead
from kernels_pallas.attention import attention

pytestmark = pytest.mark.slow

# batch, time, heads, groups, key width, value width.
SHAPES = {
    "130M": (8, 2048, 12, 12, 64, 64),
    "350M": (4, 4096, 16, 4, 64, 64),
    "1.5B": (1, 16384, 16, 4, 128, 128),
    "many heads": (2, 2048, 32, 8, 128, 128),
    "wide": (1, 8192, 8, 4, 256, 256),
    "latent": (1, 4096, 16, 16, 192, 128),
    "odd": (2, 3000, 8, 2, 80, 72),
}
LEARNED_AND_FIXED = ("sinks", "segment_ids", "prefix_length")
OPTIONS = {
    "causal": ((), {}),
    "full": ((), {"causal": False}),
    "window kept": ((), {"window": 1024, "kept": 4}),
    "packed": (("segment_ids",), {}),
    "everything": (LEARNED_AND_FIXED, {"window": 1024, "kept": 4, "softcap": 50.0}),
}


def compiled(shape, option, dtype=jnp.bfloat16):
    batch, time, heads, groups, width, value_width = SHAPES[shape]
    names, options = OPTIONS[option]
    sizes = {"q": (heads, width), "k": (groups, width), "v": (groups, value_width)}
    values = {name: jax.ShapeDtypeStruct((batch, time, *size), dtype) for name, size in sizes.items()}
    values |= {"sinks": jax.ShapeDtypeStruct((heads,), jnp.float32)} if "sinks" in names else {}
    fixed = {"segment_ids": (batch, time), "prefix_length": (batch,)}
    fixed = {name: jax.ShapeDtypeStruct(fixed[name], jnp.int32) for name in names if name in fixed}

    def total(values, fixed):
        y = attention(**values, **fixed, **options, implementation="pallas")
        return jnp.sum(y.astype(jnp.float32) ** 2)

    return compile_ahead(jax.grad(total), (values, fixed), "h200")


CASES = [("1.5B", option) for option in OPTIONS] + [("wide", option) for option in OPTIONS]
CASES += [
    (shape, option) for shape in ("130M", "350M", "many heads", "latent", "odd") for option in ("causal", "everything")
]


@pytest.mark.parametrize(("shape", "option"), CASES)
def test_compiles_without_spills(shape, option):
    kernels = compiled(shape, option).kernels
    parts = ["forward", "backward_queries", *(["backward_dk_dv"] if sum(SHAPES[shape][4:]) <= 256 else ["dk", "dv"])]
    assert all(any(part in kernel.name for kernel in kernels) for part in parts)
    assert all(kernel.spilled_bytes == 0 and not kernel.serialized for kernel in kernels), kernels


def test_float16_compiles_without_spills():
    kernels = compiled("1.5B", "everything", jnp.float16).kernels
    assert all(kernel.spilled_bytes == 0 and not kernel.serialized for kernel in kernels), kernels


def test_no_logits_are_kept():
    batch, time, heads = SHAPES["1.5B"][:3]
    assert compiled("1.5B", "causal").temporary_bytes < 0.1 * 2 * batch * heads * time**2
