"""Dense channel mixers against their formulas, in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.models.auxiliary import Auxiliary
from efficient_lm.models.ffns.base import FFNSpec
from efficient_lm.models.ffns.dense import sparse
from efficient_lm.models.layers.activations import ACTIVATIONS
from efficient_lm.models.parameters import Blueprint, Initialization

WIDTH = 32
FUNCTIONS = {
    "gelu": lambda z: 0.5 * z * (1 + np.vectorize(math.erf)(z / np.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    "identity": lambda z: z,
    "quick_gelu": lambda z: z / (1 + np.exp(-1.702 * z)),
    "relu": lambda z: np.maximum(z, 0),
    "relu_squared": lambda z: np.maximum(z, 0) ** 2,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "tanh": np.tanh,
}  # fmt: skip
FIXED = [("swiglu", {}, "silu"), ("reglu", {}, "relu"), ("geglu", {}, "gelu_tanh")]
FIXED += [("geglu", {"approximate": False}, "gelu")]
FIXED += [("swiglu", {"gate_multiplier": 0.5, "output_multiplier": 1.5}, "silu")]
FIXED += [("clamped_swiglu", {"limit": 0.5, "slope": 0.7, "gate_multiplier": 0.5}, "clamped")]
CASES = FIXED + [(kind, {"activation": name}, name) for kind in ("mlp", "glu") for name in FUNCTIONS]


@pytest.mark.parametrize(("kind", "options", "activation"), CASES)
def test_equals_its_formula(kind, options, activation):
    spec = FFNSpec.lookup(kind).model_validate({"kind": kind, "bias": True, "hidden": 24, **options})
    ffn = Blueprint(lambda: spec.build(WIDTH, Initialization()))
    x, key = np.asarray(jax.random.normal(jax.random.key(1), (2, 3, WIDTH))), jax.random.key(2)
    params = jax.tree.map(lambda leaf: np.asarray(leaf + 0.3 * jax.random.normal(key, leaf.shape)), ffn.init(key))
    got, auxiliary = jax.jit(lambda params, x: ffn(params)(x, None))(params, x)
    if kind == "mlp":
        hidden = FUNCTIONS[activation](x @ params["up"]["weight"] + params["up"]["bias"])
    else:
        both = np.einsum("bte,egm->btgm", x, params["gate_up"]["weight"]) + params["gate_up"]["bias"]
        gate, up = spec.gate_multiplier * both[..., 0, :], both[..., 1, :]
        if activation == "clamped":
            assert (gate > 0.5).any() and (abs(up) > 0.5).any()
            gate, up = np.minimum(gate, 0.5), np.clip(up, -0.5, 0.5) + 1
            hidden = gate / (1 + np.exp(-0.7 * gate)) * up
        else:
            hidden = FUNCTIONS[activation](gate) * up
    want = spec.output_multiplier * (hidden @ params["down"]["weight"] + params["down"]["bias"])
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert auxiliary == Auxiliary()
    assert spec.flops_per_token(WIDTH) == 2 * sum(p["weight"].size for p in params.values())


@pytest.mark.parametrize("kind", ["reglu", "mlp"])
def test_units_far_above_the_mean_stay(kind):
    spec = FFNSpec.lookup(kind).model_validate({"kind": kind, "hidden": 64, "sparsity": 0.9})
    ffn = Blueprint(lambda: spec.build(WIDTH, Initialization()))
    params, x = ffn.init(jax.random.key(0)), np.asarray(jax.random.normal(jax.random.key(1), (1, 200, WIDTH)))
    hidden = np.asarray(jax.jit(lambda params, x: ffn(params).hidden(x))(params, x))
    first = params["up"]["weight"] if kind == "mlp" else params["gate_up"]["weight"][:, 0]
    units = x @ np.asarray(first)
    # 0.9 of a normal distribution is below 1.2815516 standard deviations above the mean.
    kept = np.maximum(units - units.mean(-1, keepdims=True) - 1.2815516 * units.std(-1, keepdims=True), 0)
    assert 0.08 < (kept > 0).mean() < 0.12
    want = FUNCTIONS["gelu"](kept) if kind == "mlp" else kept * (x @ np.asarray(params["gate_up"]["weight"][:, 1]))
    np.testing.assert_allclose(hidden, want, atol=1e-5)


def test_what_stays_is_decided_in_float32():
    units = (100 + np.random.default_rng(0).standard_normal((4, 512))).astype(jnp.bfloat16)
    kept = sparse(jnp.asarray(units), 0.9)
    assert kept.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kept, sparse(jnp.asarray(units).astype(jnp.float32), 0.9).astype(jnp.bfloat16))


def test_every_activation_is_tested():
    assert set(FUNCTIONS) == set(ACTIVATIONS)
