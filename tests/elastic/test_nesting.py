"""Steps that train the models inside a model: whose gradients they take, and in which proportion."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_lm.elastic.mixed import MixedSpec
from efficient_lm.elastic.nested import nested_models
from efficient_lm.elastic.nesting import WHOLE, JointSpec, Loss, SampleSpec, SandwichSpec
from efficient_lm.errors import ConfigError
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.objectives.causal_lm import CausalLMSpec
from efficient_lm.objectives.distillation import distillation, teacher_of
from efficient_lm.training.step import initial_state, make_step
from efficient_lm.validation import validate

TIME = 16
KEY = jax.random.key(3)


@cache
def model_of(**elastic):
    blocks = {
        "layer": {"mixer": {"kind": "attention", "heads": 2}, "ffn": {"kind": "swiglu", "hidden": 32}},
    }
    values = {"width": 16, "vocab_size": 32, "blocks": blocks, "layout": ["layer"], "repeats": 2, "init_std": 0.3}
    return validate(ModelSpec, values | {"elastic": elastic or {"ffn": (0.25, 0.5, 1)}}).build()


@cache
def params_of(model):
    return jax.jit(model.init)(jax.random.key(0))


def batch():
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (2, TIME + 1), 0, 32))
    context = Context.rows(2, TIME)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": np.asarray(context.positions),
            "segment_ids": np.asarray(context.segment_ids), "weights": np.ones((2, TIME), np.float32)}  # fmt: skip


LOSS = Loss(CausalLMSpec(), jnp.float32, False, lambda params: params)


@cache
def alone():
    """Gradients and sums of each model inside, and of the whole, by themselves."""
    model = model_of()
    return [jax.jit(LOSS.gradient(each))(params_of(model), batch(), KEY) for each in nested_models(model)]


def assert_close(found, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


def run(nesting, key=KEY):
    model = model_of()
    nesting.check(model.spec)
    return jax.jit(nesting.gradient(model, LOSS))(params_of(model), batch(), key)


def test_a_model_inside_moves_only_its_own():
    model = model_of()
    (smallest, _), *_ = alone()
    gate_up = smallest["stack"]["segment_0"]["layer_0"]["ffn"]["inner"]["gate_up"]["weight"]
    assert gate_up.shape == (2, 16, 2, 32)
    assert np.all(gate_up[..., 8:] == 0) and np.any(gate_up[..., :8] != 0)
    assert [each.name for each in nested_models(model)] == ["0.25", "0.5", "1"]


@pytest.mark.slow
def test_one_is_drawn_in_every_step():
    model = model_of()
    gradient = jax.jit(SampleSpec(probabilities=(0.5, 0.25, 0.25)).gradient(model, LOSS))
    drawn = [gradient(params_of(model), batch(), jax.random.key(n)) for n in range(60)]
    places = [int(sums.metrics["submodel"] / sums.weight) for _, sums in drawn]
    for place, expected in enumerate(alone()):
        grads, sums = drawn[places.index(place)]
        assert_close(grads, expected[0])
        assert sums.loss == pytest.approx(float(expected[1].loss), rel=1e-6)
    counts = np.bincount(places, minlength=3)
    assert counts[0] > counts[1] > 3 and counts[2] > 3


def weighted(weights):
    """The sum of the gradients of each model by itself, so much of each."""
    return jax.tree.map(lambda *leaves: sum(map(jnp.multiply, weights, leaves)), *(found for found, _ in alone()))


@pytest.mark.slow
def test_all_at_once():
    for nesting, weights in (
        (JointSpec(), (1 / 3, 1 / 3, 1 / 3)),
        (JointSpec(weights=(1, 1, 2)), (0.25, 0.25, 0.5)),
        (JointSpec(weights=(1, 1, 2), average=False), (1, 1, 2)),
    ):
        grads, sums = run(nesting)
        assert_close(grads, weighted(weights))
    for name, (_, own) in zip(("0.25", "0.5"), alone(), strict=False):
        assert sums.metrics[f"cross_entropy_{name}"] == pytest.approx(float(own.loss), rel=1e-6)
    assert sums.metrics["cross_entropy"] == pytest.approx(float(alone()[2][1].loss), rel=1e-6)


@pytest.mark.slow
def test_the_largest_the_smallest_and_one_between():
    grads, _ = run(SandwichSpec(distill=False))
    assert_close(grads, jax.tree.map(lambda *leaves: sum(leaves) / 3, *(found for found, _ in alone())))
    grads, _ = run(SandwichSpec(distill=False, between=0))
    (smallest, _), _, (whole, _) = alone()
    assert_close(grads, jax.tree.map(lambda a, b: (a + b) / 2, smallest, whole))


@pytest.mark.slow
def test_smaller_ones_learn_what_the_largest_says():
    """The divergence is its definition; the teacher gets no gradient through it."""
    model = model_of()
    params, data = params_of(model), batch()
    small, _, whole = nested_models(model)

    def logits(each, params):
        return jax.nn.log_softmax(each.model.logits(each.parameters(params), data["tokens"]))

    def divergence(params):
        wanted = jax.lax.stop_gradient(logits(whole, params))
        return jnp.sum(jnp.exp(wanted) * (wanted - logits(small, params)))

    value, expected = jax.jit(jax.value_and_grad(divergence))(params)
    grads, sums = run(SandwichSpec(between=0))
    assert_close(grads, jax.tree.map(lambda a, b: (a + b) / 2, expected, alone()[2][0]), 3e-5)
    teacher = teacher_of(model, params, data, jnp.float32, packed=False)
    hidden = small.model.hidden(small.parameters(params), data["tokens"])[0]
    weight = small.model.head_weight(small.parameters(params))
    assert distillation(hidden, weight, None, teacher, data).divergence == pytest.approx(float(value), rel=1e-5)
    same = distillation(teacher.hidden, teacher.weight, None, teacher, data)
    assert abs(float(same.divergence)) < 1e-4
    assert same.cross_entropy == pytest.approx(float(alone()[2][1].loss), rel=1e-5)


def test_layers_draw_parts_of_their_own():
    model, found = model_of(), {}
    gradient = jax.jit(MixedSpec().gradient(model, LOSS))
    for n in range(40):
        grads, _ = gradient(params_of(model), batch(), jax.random.key(n))
        down = np.asarray(grads["stack"]["segment_0"]["layer_0"]["ffn"]["inner"]["down"]["weight"])
        found[tuple(np.any(down != 0, axis=-1).sum(axis=1).tolist())] = grads
    # Two layers and three parts: with equal chances each pair is as likely as any other.
    assert len(found) > 6 and {size for sizes in found for size in sizes} == {8, 16, 32}
    for size, (expected, _) in zip((8, 16, 32), alone(), strict=True):
        assert_close(found[size, size], expected)


LONG = [
    pytest.param(nesting, marks=pytest.mark.slow, id=nesting.kind) for nesting in (WHOLE, SampleSpec(), JointSpec())
]


@pytest.mark.quick_for("sandwich")
@pytest.mark.parametrize("nesting", [SandwichSpec(), MixedSpec(), *LONG], ids=lambda nesting: nesting.kind)
def test_a_step_takes_them(nesting):
    model, optimizer = model_of(), optax.sgd(0.1)
    step = jax.jit(make_step(model, CausalLMSpec(), optimizer, nesting=nesting, accumulate=2))
    state, metrics = step(initial_state(params_of(model), optimizer), batch())
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0 and state["step"] == 1


@pytest.mark.slow
def test_experts_inside_experts():
    """A step of a model with fewer experts counts no loads, and a correction is moved by the whole model's alone."""
    ffn = {"kind": "moe", "experts": 4, "top_k": 1, "expert": {"kind": "swiglu", "hidden": 16}}
    ffn |= {"router": {"scores": "sigmoid", "correction": True}, "balance": {"correction_rate": 0.1}}
    blocks = {"layer": {"mixer": {"kind": "attention", "heads": 2}, "ffn": ffn}}
    values = {"width": 16, "vocab_size": 32, "blocks": blocks, "layout": ["layer"], "elastic": {"experts": (0.5, 1)}}
    model, optimizer = validate(ModelSpec, values).build(), optax.sgd(0.1)
    state = initial_state(params_of(model), optimizer)
    for probabilities, moves in (((1.0, 1e-9), False), ((1e-9, 1.0), True)):
        step = jax.jit(make_step(model, CausalLMSpec(), optimizer, nesting=SampleSpec(probabilities=probabilities)))
        after, _ = step(state, batch())
        router = after["parameters"]["stack"]["segment_0"]["layer_0"]["ffn"]["inner"]["router"]
        assert bool(np.any(router["correction"] != 0)) == moves


def test_what_a_step_costs():
    flops = [1.0, 2.0, 3.0, 6.0]
    assert SampleSpec().cost(flops) == 3.0
    assert SampleSpec(probabilities=(1, 1, 1, 3)).cost(flops) == pytest.approx(4.0)
    assert JointSpec().cost(flops) == 12.0
    assert SandwichSpec().cost(flops) == 6 + 1 + 2.5 + 2
    assert SandwichSpec(between=5, distill=False).cost(flops) == 12.0
    assert MixedSpec().cost(flops) == 3.0 and WHOLE.cost(flops) == 6.0


def test_faults():
    plain = model_of().spec.model_copy(update={"elastic": None})
    with pytest.raises(ConfigError, match=r"nesting: 'sample' trains the models inside .* model.elastic is null"):
        SampleSpec().check(plain)
    WHOLE.check(plain)
    with pytest.raises(ConfigError, match=r"nesting.probabilities: 2 values, but model.elastic makes 3 models"):
        SampleSpec(probabilities=(0.5, 0.5)).check(model_of().spec)
    with pytest.raises(ConfigError, match=r"nesting.weights: 4 values"):
        JointSpec(weights=(1, 1, 1, 1)).check(model_of().spec)
    with pytest.raises(ConfigError, match="'mixed' draws parts of each layer, and layers is no part of one"):
        MixedSpec().check(model_of(layers=(0.5, 1)).spec)
