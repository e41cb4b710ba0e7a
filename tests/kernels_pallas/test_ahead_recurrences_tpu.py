"""The TPU kernels of the recurrent operators compile for real chips, at the shapes of models of 130M to 1.5B."""

import subprocess
import sys

import pytest

# Compiled apart: Mosaic aborts the process on what it cannot lay out.
PROGRAM = """
import importlib, sys
import jax, jax.numpy as jnp
from kernels_pallas.ahead import compile_ahead

def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)

def number(*shape):
    return array(*shape, dtype=jnp.float32)

name, topology, given = sys.argv[1:]
operator = getattr(importlib.import_module("kernels_pallas." + name), name)
given = eval(given)

def forward(ids, *values):
    return operator(*values, segment_ids=ids, implementation="pallas")

def loss(ids, *values):
    y, state = forward(ids, *values)
    return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state)

for ids in (None, array(*given[0].shape[:2], dtype=jnp.int32)):
    for function in (forward, jax.grad(loss, tuple(range(1, len(given) + 1)))):
        compiled = compile_ahead(function, [ids, *given], topology)
        assert compiled.peak_bytes > 0
        assert "tpu_custom_call" in compiled.program.as_text()
        print("compiled")
"""

CASES = {
    "Mamba 130M": (
        "selective_scan",
        "[array(4, 2048, 1536), array(4, 2048, 1536), number(1536, 16), array(4, 2048, 16), array(4, 2048, 16), "
        "number(1536)]",
    ),
    "Mamba, 64 states, float32": (
        "selective_scan",
        "[number(1, 4096, 4096), number(1, 4096, 4096), number(4096, 64), number(1, 4096, 64), number(1, 4096, 64)]",
    ),
    "RG-LRU 1.5B": ("linear_recurrence", "[number(2, 2048, 2560), array(2, 2048, 2560)]"),
    "RG-LRU, float32": ("linear_recurrence", "[number(2, 2000, 1000), number(2, 2000, 1000)]"),
    "linear transformer": (
        "linear_attention",
        "[array(1, 4096, 16, 64), array(1, 4096, 16, 64), array(1, 4096, 16, 64)]",
    ),
    "Mamba-2 130M": (
        "linear_attention",
        "[array(4, 2048, 1, 128), array(4, 2048, 1, 128), array(4, 2048, 24, 64), number(4, 2048, 24)]",
    ),
    "RetNet 1.5B, float32": (
        "linear_attention",
        "[number(1, 2048, 8, 256), number(1, 2048, 8, 256), number(1, 2048, 8, 256), number(1, 2048, 8)]",
    ),
    "GLA 1.5B": (
        "linear_attention",
        "[array(1, 2048, 4, 256), array(1, 2048, 4, 256), array(1, 2048, 4, 256), number(1, 2048, 4, 256)]",
    ),
    "DeltaNet": (
        "delta_rule",
        "[array(1, 2048, 16, 128), array(1, 2048, 16, 128), array(1, 2048, 16, 128), array(1, 2048, 16)]",
    ),
    "gated DeltaNet 1.5B, float32": (
        "delta_rule",
        "[number(1, 2048, 4, 256), number(1, 2048, 4, 256), number(1, 2048, 4, 256), number(1, 2048, 4), "
        "number(1, 2048, 4)]",
    ),
    "Kimi delta attention": (
        "delta_rule",
        "[array(1, 2048, 8, 128), array(1, 2048, 8, 128), array(1, 2048, 16, 128), array(1, 2048, 16), "
        "number(1, 2048, 16, 128)]",
    ),
    "short convolution": ("short_convolution", "[array(4, 2048, 1792), array(4, 1792), array(1792)]"),
    "short convolution, float32": ("short_convolution", "[number(1, 2000, 4096), number(11, 4096)]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("case", CASES)
def test_compiles_forward_and_backward(case, topology):
    name, given = CASES[case]
    done = subprocess.run([sys.executable, "-c", PROGRAM, name, topology, given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("compiled") == 4
