"""muP: nothing changes at the base width, ratios follow from declarations, factors stay with the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import load_run_config
from efficient_lm.errors import ConfigError
from efficient_lm.models.parameters import ZEROS, Declaration, parameter_table
from efficient_lm.training.optimizers.adamw import AdamWSpec
from efficient_lm.training.optimizers.base import OptimizerSpec
from efficient_lm.training.optimizers.muon import MuonSpec
from efficient_lm.training.parameterization import Growth, started
from efficient_lm.training.setup import prepare, with_factors

SMALL = ["tokenizer=bytes", "train.batch_size=2", "train.sequence_length=16", "train.steps=10", "model.repeats=1"]
MUP = ["parameterization=mup", "parameterization.base_width=32"]


def config(*keys, width=128):
    return load_run_config([*SMALL, f"model.width={width}", "model.vocab_size=259", *keys])


def growths(*keys):
    """Of a model four times as wide as its base, by path."""
    checked = config(*MUP, *keys)
    model = checked.model.build()
    found = parameter_table(model.declarations)
    leaves = jax.tree.leaves(checked.parameterization.growth(model), is_leaf=lambda leaf: isinstance(leaf, Growth))
    assert [leaf.declared for leaf in leaves] == [declared for _, declared in found]
    return {path.removeprefix("stack.segment_0.layer_0."): leaf for (path, _), leaf in zip(found, leaves, strict=True)}


class Unit(OptimizerSpec):
    update_size = "unit"


class Gradient(OptimizerSpec):
    update_size = "gradient"


class OfParameter(OptimizerSpec):
    update_size = "parameter"


def figures(growth):
    """Factor of the start; of the rate where steps are of one size, of the gradient's, of the parameter's."""
    kinds = (kind(learning_rate=1.0) for kind in (Unit, Gradient, OfParameter))
    return growth.start, *(kind.rate(growth) for kind in kinds)


HIDDEN, READS_OUT, VECTOR, HEAD = (1, 0.25, 1, 0.5), (0.5, 0.25, 0.25, 1), (1, 1, 4, 1), (2, 1, 4, 1)


def test_a_mixture_of_experts():
    """Tensor Programs V, table 3: matrices, maps to a number of values that stays, vectors; the head as in table 8."""
    found = growths("mixer.head_size=8", "mixer.kv_heads=2", "ffn=moe", "ffn.experts=4", "ffn.expert.expansion=2")
    kinds = {path: figures(growth) for path, growth in found.items()}
    assert kinds["embedding.tokens"] == kinds["mixer.input_norm.scale"] == kinds["head.norm.scale"] == VECTOR
    assert kinds["head.weight"] == pytest.approx(HEAD)
    assert kinds["mixer.inner.query.weight"] == kinds["mixer.inner.output.weight"] == HIDDEN
    # Two heads for keys and values at any width.
    assert kinds["mixer.inner.key_value.weight"] == pytest.approx(READS_OUT)
    assert kinds["ffn.inner.router.weight"] == pytest.approx(READS_OUT)
    experts = {path: kind for path, kind in kinds.items() if "mlp" in found[path].declared.axes}
    assert len(experts) == 2 and set(experts.values()) == {HIDDEN}


def test_a_state_space_model():
    found = growths("mixer=mamba2", "mixer.head_size=16", "mixer.state_size=8", "ffn=mlp", "ffn.hidden=64")
    kinds = {path.removeprefix("mixer.inner."): figures(growth) for path, growth in found.items()}
    for name in ("gate_input.weight", "dt.weight", "output.weight"):
        assert kinds[name] == HIDDEN, name
    for name in ("A_log", "D", "dt_bias", "convolution.weight", "convolution.bias", "norm.scale"):
        assert kinds[name] == VECTOR, name
    # A state of as many values at any width; so many hidden units, too.
    assert kinds["input_output.weight"] == pytest.approx(READS_OUT)
    assert kinds["input_output_convolution.weight"] == (1, 1, 1, 1)
    assert kinds["ffn.inner.up.weight"] == pytest.approx(READS_OUT)
    assert kinds["ffn.inner.down.weight"] == pytest.approx((1, 1, 4, 1))


@pytest.mark.parametrize("keys", [["mixer=mamba", "mixer.state_size=4"], ["mixer=gated_delta_net"], ["mixer=rg_lru"]])
def test_what_a_start_is_follows_from_the_base(keys):
    """Drawn values have the spread that the ratios say; vectors that of the base, whatever it is."""
    for path, growth in growths(*keys).items():
        wanted = growth.inputs**-0.5 * min(1.0, (growth.outputs / growth.inputs) ** 0.5)
        mine, its = (getattr(each.initializer, "scale", None) for each in (growth.declared, growth.base))
        if mine is not None:
            assert mine * growth.start == pytest.approx(its * wanted), path


def test_a_rule_that_reads_a_token_declares_its_sum():
    found = growths("depth=mixture_of_depths", "depth.every=1")
    growth = next(growth for path, growth in found.items() if path.endswith("router.weight"))
    assert (growth.inputs, growth.outputs) == (4, 1) and growth.start == pytest.approx(0.5)


def test_at_the_base_width_the_program_is_the_standard_one():
    plain, held = prepare(config(width=32)), prepare(config(*MUP, width=32))
    assert held.config.model == plain.config.model
    batch = plain.layout.abstract_batch(2, 16)
    texts = [setup.step.lower(setup.abstract_state(), batch).as_text() for setup in (plain, held)]
    assert texts[0] == texts[1]
    params = {"a": jnp.ones(3)}
    assert started(params, None) is params
    same = jax.tree.leaves(held.growths, is_leaf=lambda leaf: isinstance(leaf, Growth))
    assert {figures(growth) for growth in same} == {(1, 1, 1, 1)}


def test_rates_are_multiplied_and_decay_is_not():
    """One step of AdamW from a zero gradient's moments, against the equation."""
    setup = prepare(config(*MUP, "mixer.head_size=8", "schedule=constant", "schedule.warmup=0"))
    spec = AdamWSpec(learning_rate=0.1, weight_decay=0.5)
    declared = setup.model.declarations
    optimizer = spec.build(lambda step: 0.1, declared, growths=setup.growths)
    params = jax.tree.map(lambda d: jnp.ones(d.shape), declared, is_leaf=lambda leaf: hasattr(leaf, "axes"))
    grads = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1e3), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for (path, declaration), update, growth in zip(
        parameter_table(declared),
        jax.tree.leaves(updates),
        jax.tree.leaves(setup.growths, is_leaf=lambda leaf: isinstance(leaf, Growth)),
        strict=True,
    ):
        wanted = -0.1 / growth.inputs - (0.1 * 0.5 if declaration.decay else 0.0)
        np.testing.assert_allclose(update, wanted, rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("update_rms", [0.2, None])
@pytest.mark.parametrize("wide", [(64, 64), (64, 16), (16, 64)])
def test_the_spectral_norm_of_a_step_of_muon(wide, update_rms):
    """It goes as the root of outputs over inputs (Yang, Simon & Bernstein 2023, condition 1)."""
    spec = MuonSpec(update_rms=update_rms)
    growth = Growth(*(Declaration(shape, ("embed", "mlp"), True, ((0,), (1,)), ZEROS) for shape in (wide, (16, 16))))

    def norm(declared, rate):
        gradient = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(declared.shape), jnp.float32)}
        direction = spec.direction({"w": declared})
        step, _ = direction.update(gradient, direction.init(gradient), gradient)
        return rate * np.linalg.norm(step["w"], 2)

    found = norm(growth.declared, spec.rate(growth)) / norm(growth.base, 1.0)
    # Newton and Schulz bring singular values to one or near it.
    assert found == pytest.approx((growth.outputs / growth.inputs) ** 0.5, rel=0.2)


def test_factors_of_the_model():
    checked = with_factors(config(*MUP, "mixer.heads=[2,4]", "model.repeats=2", "model.logit_multiplier=3.0"))
    assert checked.model.logit_multiplier == 0.75 and checked.parameterization.held_to_base
    # Of 16 and 8 values per head came 64 and 32.
    assert checked.model.blocks["layer"].mixer.scale == pytest.approx((1 / 16, 8**-0.5 / 4))
    assert with_factors(checked) == checked
    more_heads = with_factors(config(*MUP, "mixer.head_size=8", "model.embedding_multiplier=sqrt_width"))
    assert more_heads.model.blocks["layer"].mixer.scale is None
    assert more_heads.model.embedding_multiplier == 32**0.5
    branches = with_factors(config(*MUP, "mixer=parallel", "mixer.second.mixer.heads=2")).model.blocks["layer"].mixer
    assert branches.second.mixer.scale == pytest.approx(1 / 16)
    latent = with_factors(config(*MUP, "mixer=multi_latent", "mixer.heads=2")).model.blocks["layer"].mixer
    assert latent.scale == pytest.approx(24**-0.5 * 24 / 96)


def test_a_model_that_is_there_keeps_its_factors():
    begun = config(*MUP).model_copy(update={"init_from": "runs/other"})
    assert with_factors(begun).model == begun.model and with_factors(begun).parameterization.held_to_base


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["mixer.heads=3", "model.width=96"], r"parameterization: at base_width=32: .*3 heads do not divide width 32"),
        (["parameterization.base={repeats: 2}"], r"parameterization\.base: makes a model of other parts"),
        (["mixer=native_sparse", "mixer.heads=2"], r"blocks\.layer\.mixer\.head_size: 64 values at width 128"),
        (["parameterization.base={layoutt: 2}"], r"at base_width=32: model\.layoutt: unknown key"),
        (["parameterization=mupp"], r"parameterization=mupp: no such config; did you mean 'mup'"),
        (["parameterization.base_widht=3"], r"base_widht.*did you mean 'base_width'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(keys, said):
    with pytest.raises(ConfigError, match=said):
        prepare(config(*MUP, *keys))
