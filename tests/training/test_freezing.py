"""What training leaves as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.parameters import decay_mask, parameter_table
from efficient_lm.objectives.causal_lm import CausalLMSpec
from efficient_lm.training.freezing import for_trained, trainable
from efficient_lm.training.parallelism import ParallelismSpec
from efficient_lm.training.step import initial_state, make_step, state_shardings

MODEL = ModelSpec.model_validate(
    {
        "width": 16,
        "vocab_size": 31,
        "blocks": {
            "layer": {
                "mixer": {"kind": "attention", "heads": 2},
                "ffn": {"kind": "moe", "experts": 3, "top_k": 2, "expert": {"kind": "swiglu", "hidden": 8}},
            }
        },
        "layout": ["layer"],
    }
).build()


def changed(chosen):
    """Parameters before and after two steps with weight decay, by path, and the state."""
    tokens = jax.random.randint(jax.random.key(1), (2, 13), 0, 31)
    ones = jnp.ones((2, 12), jnp.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones, "weights": ones * 1.0}
    batch["positions"] = jnp.broadcast_to(jnp.arange(12), (2, 12))
    optimizer = for_trained(optax.adamw(0.1, weight_decay=0.1, mask=decay_mask(MODEL.declarations)), chosen)
    before = initial_state(MODEL.init(jax.random.key(0)), optimizer)
    step = jax.jit(make_step(MODEL, CausalLMSpec(), optimizer, chosen=chosen, clip_norm=1.0))
    after, metrics = step(step(before, batch)[0], batch)
    names = [name for name, _ in parameter_table(MODEL.declarations)]
    pairs = zip(jax.tree.leaves(before["parameters"]), jax.tree.leaves(after["parameters"]), strict=True)
    return dict(zip(names, pairs, strict=True)), after, metrics


def test_frozen_parameters_and_experts_stay_to_the_bit():
    chosen = trainable(MODEL.declarations, only=[r"ffn\.inner\.(experts|router)"], frozen_experts=[0, 2])
    found, state, metrics = changed(chosen)
    for name, (before, after) in found.items():
        if "experts" in name or "router" in name:
            place = 2 if "router" in name else 1
            moved = np.abs(np.moveaxis(after - before, place, 0)).reshape(3, -1).max(axis=1)
            assert moved[0] == moved[2] == 0 and moved[1] > 0, name
        else:
            np.testing.assert_array_equal(before, after)
    assert float(metrics["grad_norm"]) > 0
    # No moments of what is frozen.
    sizes = [leaf.size for leaf in jax.tree.leaves(state["optimizer"])]
    trained = sum(before.size for name, (before, _) in found.items() if "experts" in name or "router" in name)
    assert sum(sizes) == pytest.approx(2 * trained, abs=2)


def test_the_norm_is_of_what_is_trained():
    frozen = trainable(MODEL.declarations, freeze=["embedding", "stack"])
    found, _, metrics = changed(frozen)
    assert {name for name, (a, b) in found.items() if np.any(a != b)} == {"head.norm.scale", "head.weight"}
    _, _, whole = changed(None)
    assert 0 < float(metrics["grad_norm"]) < float(whole["grad_norm"])


def test_moments_live_where_their_parameters_do():
    chosen = trainable(MODEL.declarations, only=["embedding"])
    optimizer = for_trained(optax.adamw(0.1, mask=decay_mask(MODEL.declarations)), chosen)
    shardings = state_shardings(MODEL, optimizer, ParallelismSpec().build(jax.devices()[:1]))
    shapes = jax.eval_shape(lambda: initial_state(MODEL.init(jax.random.key(0)), optimizer))
    assert jax.tree.structure(shardings) == jax.tree.structure(shapes)


FAULTS = [
    ({"only": ["experts("]}, "train.only: 'experts\\(' is no regular expression"),
    ({"freeze": ["embeding"]}, "train.freeze: no parameter's path has 'embeding' in it; .*embedding.tokens"),
    ({"frozen_experts": [3]}, "train.frozen_experts: there is no expert 3; they are 0 to 2"),
    ({"freeze": ["."]}, "nothing is left to train"),
    ({"only": ["experts"], "frozen_experts": [0, 1, 2]}, "nothing is left to train"),
]


@pytest.mark.parametrize(("options", "words"), FAULTS)
def test_faults(options, words):
    with pytest.raises(ConfigError, match=words):
        trainable(MODEL.declarations, **options)


def test_nothing_said_is_nothing_frozen():
    assert trainable(MODEL.declarations) is None
