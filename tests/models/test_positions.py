"""Position encodings against the reference's tables (transformers 5.23) and against their definitions."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.layers.positions import AlibiSpec, PositionSpec, RelativeBiasSpec, RotarySpec
from efficient_lm.validation import validate

TABLES = json.loads((Path(__file__).parent.parent / "goldens" / "positions.json").read_text())
NAMES = {"low_freq_factor": "low_frequency_factor", "high_freq_factor": "high_frequency_factor",
         "original_max_position_embeddings": "original_context", "rope_type": "kind"}  # fmt: skip


@pytest.mark.parametrize("name", ["linear", "llama3", "yarn", "yarn_gpt_oss"])
def test_rotary_scaling_has_the_reference_frequencies(name):
    table = TABLES[name]
    options = {NAMES.get(key, key): value for key, value in table["parameters"].items()}
    spec = RotarySpec(theta=options.pop("rope_theta"), scaling=options)
    rotary = spec.build(4, table["head_size"])
    np.testing.assert_allclose(rotary.frequencies, table["frequencies"], rtol=3e-7)
    assert rotary.temperature == pytest.approx(table["temperature"], rel=1e-6)


@pytest.mark.parametrize("heads", [4, 6, 8, 12])
def test_alibi_slopes(heads):
    bias = AlibiSpec().build(heads, 8).bias(jnp.array([[1]]), jnp.array([[0, 1]]))
    np.testing.assert_allclose(-bias[0, :, 0, 0], TABLES[f"alibi_{heads}"], rtol=1e-6)
    assert np.all(np.asarray(bias[0, :, 0, 1]) == 0)


def test_relative_bias_buckets():
    table = TABLES["t5_buckets"]
    spec = RelativeBiasSpec(buckets=table["buckets"], max_distance=table["max_distance"])
    module = spec.build(1, 8)
    module.table[...] = jnp.arange(table["buckets"], dtype=jnp.float32)[:, None]
    distances = jnp.arange(len(table["bucket_of_distance"]))
    bias = module.bias(distances[None], jnp.zeros((1, 1), jnp.int32))
    assert bias[0, 0, :, 0].tolist() == table["bucket_of_distance"]


def test_rotation_depends_on_distance_alone():
    rotary = RotarySpec().build(1, 16)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def product(i, j):
        return float(jnp.sum(rotary.rotate(q, jnp.array([[i]])) * rotary.rotate(k, jnp.array([[j]]))))

    assert product(9, 4) == pytest.approx(product(25, 20), rel=1e-5)
    assert abs(product(9, 4) - product(9, 5)) > 1e-3


def test_partial_rotation_leaves_the_rest():
    rotary = RotarySpec(fraction=0.5).build(1, 16)
    x = jax.random.normal(jax.random.key(0), (1, 3, 1, 16))
    y = rotary.rotate(x, jnp.array([[0, 5, 9]]))
    np.testing.assert_array_equal(y[..., 8:], x[..., 8:])
    assert not np.allclose(y[0, 1:, :, :8], x[0, 1:, :, :8])


def test_an_odd_share_turns_one_value_more():
    rotary = RotarySpec(fraction=0.5, theta=100.0).build(1, 10)
    np.testing.assert_allclose(rotary.frequencies, 100.0 ** -(np.array([0, 2, 4]) / 5), rtol=1e-6)
    y = np.asarray(rotary.rotate(jnp.ones((1, 1, 1, 10)), jnp.array([[1]])))[0, 0, 0]
    np.testing.assert_allclose(y[[0, 3]], [np.cos(1) - np.sin(1), np.cos(1) + np.sin(1)], rtol=1e-5)
    assert np.all(y[6:] == 1) and np.all(y[:6] != 1)


def test_yarn_whose_range_ends_before_it_begins_is_read_as_the_reference_does():
    scaling = {"kind": "yarn", "factor": 4.0, "original_context": 10**9}
    plain, scaled = (RotarySpec(theta=100.0, scaling=spec).build(1, 16) for spec in (None, scaling))
    np.testing.assert_allclose(scaled.frequencies, np.array(plain.frequencies) / 4, rtol=1e-6)


def test_llama3_factors_must_be_in_order():
    with pytest.raises(ConfigError, match="high_frequency_factor must be above low_frequency_factor"):
        validate(RotarySpec, {"scaling": {"kind": "llama3", "factor": 8.0, "low_frequency_factor": 4.0}}, "position")


def test_every_position_kind_is_registered():
    assert set(PositionSpec.kinds) == {"rotary", "alibi", "relative_bias", "none"}
