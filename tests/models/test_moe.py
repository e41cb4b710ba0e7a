"""Mixture of experts against the loop over experts: values, gradients, whatever the loads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.context import Context
from efficient_lm.models.ffns.base import FFNSpec
from efficient_lm.models.ffns.dense import DenseSpec
from efficient_lm.models.ffns.moe import MoESpec
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.layers.groups import Groups
from efficient_lm.models.parameters import Blueprint, Initialization

WIDTH, HIDDEN, BATCH, TIME = 8, 6, 2, 9
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0]], np.int32)
EXPERT = {"kind": "swiglu", "hidden": HIDDEN}
SHARED = {"shared": {"kind": "swiglu", "hidden": 5}, "shared_gate": True}
SIGMOID = {"scores": "sigmoid", "bias": True, "correction": True, "normalize": True, "scale": 2.5}
CASES = {
    "softmax": {"experts": 5, "top_k": 2, "router": {"bias": True}, **SHARED},
    "sigmoid": {"experts": 5, "top_k": 3, "router": SIGMOID},
    "one": {"experts": 5, "top_k": 1, "router": {"bias": True}, "shared": SHARED["shared"]},
    "all": {"experts": 3, "top_k": 3, "router": {"bias": True, "normalize": True}},
}
BIASES = {"even": 0.0, "hot": [50.0], "empty": [0.0, -50.0, -50.0], "hot last": [0.0, 0.0, 0.0, 0.0, 50.0]}


def spec_of(**options):
    return MoESpec.model_validate({"kind": "moe", "expert": EXPERT, **options})


@pytest.fixture(scope="module")
def built(bold):
    """``built(case)`` → spec, parameters, and the program of value, results and gradients."""
    return functools.cache(functools.partial(_built, bold))


def _built(bold, case):
    spec = spec_of(balance={"load_balance": 0.0}, **CASES[case])
    assert not list(spec.faults(WIDTH))
    blueprint = Blueprint(lambda: spec.build(WIDTH, Initialization()))
    params = bold(blueprint)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def run(params, x, segments, pull):
        y, auxiliary = blueprint(params)(x, context_of(segments, record=True))
        return jnp.sum(y * pull), (y, auxiliary.observed)

    return spec, params, run


def context_of(segments, **options):
    segments = jnp.asarray(segments)
    return Context(jnp.zeros(segments.shape, jnp.int32), segments, **options)


def biased(params, bias):
    start = params["router"]["bias"]
    bias = jnp.zeros_like(start).at[: np.size(bias)].set(jnp.asarray(bias)[: len(start)] if np.size(bias) > 1 else bias)
    return params | {"router": params["router"] | {"bias": start + bias}}


def silu(z):
    return z / (1 + jnp.exp(-z))


def swiglu(params, x):
    both = jnp.einsum("bte,egm->btgm", x, params["gate_up"]["weight"])
    return (silu(both[..., 0, :]) * both[..., 1, :]) @ params["down"]["weight"]


def loop(spec, params, x, segments):
    """Every token through every expert, weighted with 0 where it was not chosen."""
    router, live = params["router"], (segments != 0)[..., None]
    logits = x @ router["weight"] + router["bias"]
    if spec.router.scores == "softmax":
        scores = jnp.exp(logits - logits.max(-1, keepdims=True))
        scores = scores / scores.sum(-1, keepdims=True)
    else:
        scores = 1 / (1 + jnp.exp(-logits))
    ranking = scores + jax.lax.stop_gradient(router.get("correction", 0.0))
    least = jnp.sort(ranking, axis=-1)[..., -spec.top_k][..., None]
    weights = jnp.where(ranking >= least, scores, 0.0)
    if spec.router.normalize:
        weights = weights / weights.sum(-1, keepdims=True)
    y = 0.0
    for expert in range(spec.experts):
        one = jax.tree.map(lambda leaf, expert=expert: leaf[expert], params["experts"])
        y = y + spec.router.scale * weights[..., expert, None] * swiglu(one, x)
    if spec.shared is not None:
        gate = 1 / (1 + jnp.exp(-x @ params["shared_gate"]["weight"])) if spec.shared_gate else 1.0
        y = y + gate * swiglu(params["shared"], x)
    return jnp.where(live, y, 0.0), jnp.where(live, ranking >= least, False)


@pytest.mark.quick_for("softmax-even", "softmax-empty", "softmax-hot", "one-hot", "one-empty", "one-even")
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop_over_experts(case, bias, built):
    spec, params, run = built(case)
    params = biased(params, BIASES[bias])
    x, pull = (jax.random.normal(jax.random.key(key), (BATCH, TIME, WIDTH)) for key in (2, 3))
    gradients, (y, observed) = run(params, x, SEGMENTS, pull)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), (params, x, pull))

        def loss(params, x):
            y, taken = loop(spec, params, x, SEGMENTS)
            return jnp.sum(y * wide[2]), (y, taken)

        wanted, (want, taken) = jax.grad(loss, argnums=(0, 1), has_aux=True)(*wide[:2])
    np.testing.assert_allclose(y, want, atol=2e-6 * np.abs(want).max(), rtol=1e-4)
    assert jax.tree.structure(gradients) == jax.tree.structure(wanted)
    for got, gradient in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, gradient, atol=1e-5 * max(np.abs(gradient).max(), 1e-3), rtol=1e-3)
    load = np.asarray(taken).sum((0, 1))
    np.testing.assert_array_equal(observed["expert_load"], load)
    empty = load == 0
    assert np.all(np.asarray(gradients[0]["experts"]["down"]["weight"])[empty] == 0)
    assert {"hot": load[0] == 15, "empty": case == "all" or empty[1:3].any() or spec.top_k == 3}.get(bias, True)


def test_padding_goes_nowhere(built):
    spec, params, run = built("softmax")
    x, pull = (jax.random.normal(jax.random.key(key), (BATCH, TIME, WIDTH)) for key in (2, 3))
    other = jnp.where(SEGMENTS[..., None] == 0, 1e3, x)
    (gradients, dx), (y, observed) = run(params, x, SEGMENTS, pull)
    again = run(params, other, SEGMENTS, pull)
    np.testing.assert_array_equal(y, again[1][0])
    jax.tree.map(np.testing.assert_array_equal, gradients, again[0][0])
    padding = SEGMENTS == 0
    assert np.all(np.asarray(y)[padding] == 0)
    assert np.all(np.asarray(dx)[padding] == 0)
    assert np.all(np.asarray(observed["routes"])[padding] == -1)
    assert np.asarray(observed["expert_load"]).sum() == spec.top_k * np.sum(~padding)


DENSE = [kind for kind, found in FFNSpec.kinds.items() if issubclass(found, DenseSpec)]


@pytest.mark.quick_for("mlp-options0", "swiglu-options5")
@pytest.mark.parametrize(("kind", "options"), [(kind, {}) for kind in DENSE] + [("swiglu", {"ternary": True})])
def test_any_dense_kind_is_an_expert(kind, options, drawn):
    spec = FFNSpec.lookup(kind).model_validate({"kind": kind, "hidden": HIDDEN, "bias": True, **options})
    several = Blueprint(lambda: spec.build(WIDTH, Initialization(), 3))
    one = Blueprint(lambda: spec.build(WIDTH, Initialization()))
    params = drawn(several, 0.1)
    x = jax.random.normal(jax.random.key(2), (6, WIDTH))

    @jax.jit
    def run(params, x):
        module = several(params)
        cut = [one(jax.tree.map(lambda leaf, expert=expert: leaf[expert], params)) for expert in range(3)]
        uneven = [cut[0].transformed(x[:1]), cut[2].transformed(x[1:5])]
        equal = [cut[expert].transformed(x[2 * expert : 2 * expert + 2]) for expert in range(3)]
        ragged = module.transformed(x, Groups(jnp.array([1, 0, 4])))
        return (ragged[:5], module.transformed(x, Groups())), (uneven, equal)

    for got, wanted in zip(*run(params, x), strict=True):
        np.testing.assert_allclose(got, jnp.concatenate(wanted), atol=1e-5)
    for declared, single in zip(*(jax.tree.leaves(b.declarations) for b in (several, one)), strict=True):
        assert declared == single.stacked(3, "experts")


def test_flops_are_those_of_active_parameters():
    spec = spec_of(experts=16, top_k=2, **SHARED)
    sizes = jax.tree.map(lambda d: d.size, Blueprint(lambda: spec.build(WIDTH, Initialization())).declarations)
    experts = sum(jax.tree.leaves(sizes["experts"])) * 2 / 16
    rest = sum(sum(jax.tree.leaves(sizes[name])) for name in ("router", "shared", "shared_gate"))
    assert spec.flops_per_token(WIDTH) == 2 * (experts + rest)
    within = spec_of(experts=16, top_k=2, dispatch={"capacity_factor": 1.5}, **SHARED)
    assert within.flops_per_token(WIDTH) == 2 * (1.5 * experts + rest)


def model_of(repeats=1, **options):
    return ModelSpec.model_validate(
        {
            "width": WIDTH,
            "vocab_size": 11,
            "blocks": {"mix": {"mixer": None, "ffn": {"kind": "moe", "expert": EXPERT, **options}}},
            "layout": ["mix"],
            "repeats": repeats,
        }
    )


BY_EXPERT = {"choice": "expert", "balance": {"load_balance": 0}}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": 4, "top_k": 5}, "top_k: 5, but there are 4 experts; at most 4"),
        ({"expert": {"kind": "moe"}}, "expert.kind: 'moe' is not a dense channel mixer; valid: clamped_swiglu, "),
        ({"shared": {"kind": "moe"}}, "shared.kind: 'moe' is not a dense channel mixer"),
        ({"shared_gate": True}, "shared_gate: there is nothing shared to gate"),
        ({"experts": 6, "router": {"groups": 4}}, "router.groups: 4 groups do not divide 6 experts; nearest valid: 3"),
        ({"router": {"groups": 4, "top_groups": 5}}, "router.top_groups: 5, but there are 4 groups; at most 4"),
        ({"top_k": 3, "router": {"groups": 4}}, "top_groups: 1 groups of 2 experts hold fewer than top_k=3; at least"),
        ({"router": {"groups": 8, "top_groups": 2}}, "router.group_score: groups of one expert have no second best"),
        ({"balance": {"correction_rate": 0.1}}, "balance.correction_rate: there is no correction to move"),
        ({"choice": "expert"}, "balance.load_balance: with choice: expert, loads are equal; the only value is 0"),
        ({**BY_EXPERT, "router": {"normalize": True}}, "router.normalize: with choice: expert"),
        (
            {**BY_EXPERT, "experts": 4, "dispatch": {"capacity_factor": 3}},
            "dispatch.capacity_factor: 3: an expert would take more tokens than there are; at most 2",
        ),
    ],
)
def test_faults_name_the_key(options, words):
    with pytest.raises(ConfigError) as error:
        model_of(**options)
    assert str(error.value).startswith("model.blocks.mix.ffn.")
    assert words in str(error.value)


def test_a_pyramid_is_faulted_by_layer():
    shapes = [layer.ffn.experts for layer in model_of(3, experts=[2, 4, 8]).layers()]
    assert shapes == [2, 4, 8]
    with pytest.raises(ConfigError, match=r"model\.blocks\.mix\.ffn\.top_k: 3, but there are 2 experts"):
        model_of(3, experts=[4, 2, 4], top_k=3)


def test_experts_that_choose_do_not_decode():
    with pytest.raises(ConfigError, match=r"model\.blocks\.mix\.ffn\.choice: with 'expert'.*valid: 'token'"):
        model_of(**BY_EXPERT).check_decodes()
    model_of().check_decodes()
