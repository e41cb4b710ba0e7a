"""Groups of parameters, by dotted path and by logical axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.parameters import ZEROS, Declaration, parameter_table
from efficient_lm.spec import OneOf, Spec
from efficient_lm.training.optimizers import OptimizerSpec
from efficient_lm.training.optimizers.adamw import AdamWSpec
from efficient_lm.training.optimizers.lion import LionSpec
from efficient_lm.training.optimizers.sgd import SGDSpec
from efficient_lm.validation import validate


class Holder(Spec):
    optimizer: OneOf[OptimizerSpec]


DECLARATIONS = {
    "embedding": {"tokens": Declaration((7, 3), ("vocab", "embed"), False, None, ZEROS)},
    "stack": {
        "experts": Declaration((2, 2, 3, 4), ("layers", "experts", "embed", "mlp"), True, ((2,), (3,)), ZEROS),
        "heads": Declaration((2, 3, 2, 2), ("layers", "embed", "heads", "head_dim"), True, ((1,), (2, 3)), ZEROS),
        "bias": Declaration((2, 4), ("layers", "mlp"), False, None, ZEROS),
    },
    "norm": {"scale": Declaration((3,), ("embed",), False, None, ZEROS)},
}
TABLE = parameter_table(DECLARATIONS)


def drawn(seed):
    """A tree in the shape of `DECLARATIONS`, normal."""
    random = np.random.default_rng(seed)
    values = [jnp.asarray(random.standard_normal(declared.shape), jnp.float32) for _, declared in TABLE]
    shape = jax.tree.map(lambda _: 0, DECLARATIONS, is_leaf=lambda leaf: isinstance(leaf, Declaration))
    return jax.tree.unflatten(jax.tree.structure(shape), values)


def by_path(tree):
    return {name: np.asarray(leaf) for (name, _), leaf in zip(TABLE, jax.tree.leaves(tree), strict=True)}


def moved(spec, gradients, **options):
    """Parameters after a step with each of the gradients, by path."""
    params = drawn(0)
    optimizer = spec.build(lambda step: 0.1 / (1 + step), DECLARATIONS, **options)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return by_path(params)


def grouped(groups, **options):
    return validate(Holder, {"optimizer": {"kind": "adamw", **options, "groups": groups}}).optimizer


def test_rate_and_decay_are_the_groups_own():
    gradients = [drawn(seed) for seed in (1, 2)]
    spec = grouped(
        {
            "embeddings": {"match": {"axes": ["vocab"]}, "multiplier": 0.5},
            "experts": {"match": {"axes": "experts", "paths": "^stack"}, "learning_rate": 2e-3, "weight_decay": 0},
        }
    )
    found, plain = moved(spec, gradients), moved(AdamWSpec(), gradients)
    half = moved(AdamWSpec(), gradients, multipliers=0.5)
    double = moved(AdamWSpec(weight_decay=0.0), gradients, multipliers=2.0)
    for name, _ in TABLE:
        wanted = {"embedding.tokens": half, "stack.experts": double}.get(name, plain)
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def test_a_group_has_an_optimizer_of_its_own():
    gradients = [drawn(seed) for seed in (1, 2)]
    groups = {
        "vectors": {"match": {"paths": ["bias", "norm"]}, "optimizer": {"kind": "sgd", "learning_rate": 1e-3}},
        "heads": {"match": {"axes": ["heads"]}, "optimizer": {"kind": "lion", "learning_rate": 1e-3}},
    }
    spec = grouped(groups)
    found, plain = moved(spec, gradients), moved(AdamWSpec(), gradients)
    others = {name: moved(SGDSpec(), gradients) for name in ("stack.bias", "norm.scale")}
    others |= {"stack.heads": moved(LionSpec(), gradients)}
    for name, _ in TABLE:
        np.testing.assert_allclose(found[name], others.get(name, plain)[name], rtol=1e-6, err_msg=name)
    # And each has the moments of its own kind alone.
    state = spec.build(lambda step: 1.0, DECLARATIONS).init(drawn(0))
    sizes = {name: declared.size for name, declared in TABLE}
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32)
    assert moments == 2 * sum(sizes.values()) - sizes["stack.bias"] - sizes["norm.scale"] - sizes["stack.heads"]
    assert by_path(drawn(0)).keys() == sizes.keys()


def test_what_is_frozen_has_no_state_in_any_group():
    spec = grouped({"vectors": {"match": {"paths": ["bias", "norm"]}, "optimizer": {"kind": "sgd"}}})
    chosen = jax.tree.map(lambda leaf: True, drawn(0)) | {"norm": {"scale": False}}
    optimizer, params = spec.build(lambda step: 1.0, DECLARATIONS, chosen=chosen), drawn(0)
    state = optimizer.init(params)
    assert sum(leaf.shape == (3,) for leaf in jax.tree.leaves(state)) == 0
    updates, _ = optimizer.update(drawn(1), state, params)
    assert np.all(by_path(updates)["stack.bias"] != 0)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"a": {"match": {}}}, "optimizer.groups.a.match: give paths, axes or both"),
        ({"a": {"match": {"axes": "vocb"}}}, "a.match.axes: no parameter has the axis 'vocb'; did you mean 'vocab'"),
        ({"a": {"match": {"axes": ["vocab", "mlp"]}}}, "groups.a.match: no parameter has the axes vocab, mlp together"),
        ({"a": {"match": {"paths": "embeding"}}}, "a.match.paths: no parameter's path .*embedding.tokens"),
        ({"a": {"match": {"paths": "("}}}, "groups.a.match.paths: '\\(' is no regular expression"),
        (
            {"a": {"match": {"paths": "bias"}}, "b": {"match": {"axes": "mlp"}}},
            "optimizer.groups: 'stack.bias' is in a and in b",
        ),
        ({"a": {"match": {"paths": "norm"}, "multiplier": 1, "learning_rate": 1}}, "say the same; give one of them"),
        (
            {"a": {"match": {"paths": "norm"}, "weight_decay": 0, "optimizer": {"kind": "sgd"}}},
            "groups.a: give optimizer.weight_decay, and not weight_decay beside it",
        ),
        (
            {"a": {"match": {"paths": "norm"}, "optimizer": {"kind": "schedule_free_sgd"}}},
            "optimizer.kind: schedule_free_sgd works only on all parameters at once",
        ),
        ({"a": {"match": {"paths": "norm"}, "optimizer": {"kind": "sdg"}}}, "unknown optimizer kind 'sdg'; .*'sgd'"),
    ],
)  # fmt: skip
def test_faults(groups, said):
    with pytest.raises(ConfigError, match=said):
        grouped(groups).build(lambda step: 1.0, DECLARATIONS)
