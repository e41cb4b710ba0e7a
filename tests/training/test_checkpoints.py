"""Checkpoints whose arrays were saved with axes that are now divided otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_lm.errors import CheckpointError
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.training.checkpoints import Checkpoints, load_parameters
from efficient_lm.training.retention import Retention
from efficient_lm.validation import validate

SCALE = ("stack", "segment_0", "layer_0", "mixer", "inner", "norm", "scale")


def with_scale(params, change):
    """The parameters with the scale of the norm changed."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: change(leaf) if tuple(step.key for step in path) == SCALE else leaf, params
    )


def state_of(params):
    """As a run saves it: moments that differ from each other and from the parameters."""
    moments = optax.scale_by_adam().init(params)
    moments = moments._replace(
        mu=jax.tree.map(lambda leaf: leaf + 1, params), nu=jax.tree.map(lambda leaf: leaf + 2, params)
    )
    return {"parameters": params, "optimizer": {"optimizer": (moments,), "step": jnp.int32(3)}}


def saved(folder, state):
    checkpoints = Checkpoints(folder, Retention(1))
    checkpoints.save(3, state, {"step": 3})
    checkpoints.close()


@pytest.fixture
def model():
    block = {"mixer": {"kind": "mamba2", "heads": 4, "head_size": 4, "groups": 2, "state_size": 4}}
    values = {"width": 8, "vocab_size": 16, "blocks": {"only": block}, "layout": ["only"], "repeats": 3}
    return validate(ModelSpec, values, "model").build()


def test_a_norm_of_groups_that_was_saved_with_an_axis_of_them(model, drawn, tmp_path):
    params = drawn(model, 0.1)
    before = with_scale(params, lambda leaf: leaf.reshape(3, 2, 2, 4))
    saved(tmp_path, state_of(before))
    loaded, record = load_parameters(tmp_path, model.declarations)
    assert record["step"] == 3
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    wanted = state_of(params)
    mesh = jax.make_mesh((1,), ("data",))
    places = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    expected = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places), wanted)
    checkpoints = Checkpoints(tmp_path)
    found, _ = checkpoints.restore(expected)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert all(leaf.sharding == places for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("shape", [(3, 8, 2), (3, 2, 8), (3, 4, 8)])
def test_as_many_values_in_another_order_are_another_architecture(model, drawn, tmp_path, shape):
    """Four heads of four values are neither eight of two, nor two of eight, nor more."""
    other = with_scale(drawn(model), lambda leaf: jnp.resize(leaf, shape))
    saved(tmp_path, {"parameters": other, "optimizer": {"step": jnp.int32(3)}})
    with pytest.raises(CheckpointError, match=r"another architecture: '.*norm.scale' is float32"):
        load_parameters(tmp_path, model.declarations)
