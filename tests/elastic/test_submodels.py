"""A smaller model inside another computes what the other does without the rest, whatever it is smaller along."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.elastic.choices import choose, units_of
from efficient_lm.elastic.submodels import submodel_parameters, submodel_spec
from efficient_lm.errors import ConfigError
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.mixers.base import MixerSpec
from efficient_lm.models.parameters import count_parameters, is_declaration
from efficient_lm.validation import validate

WIDTH, TIME = 32, 24
TOKENS = jax.random.randint(jax.random.key(9), (2, TIME), 0, 32)
SIZES = {
    "attention": {"heads": 4, "kv_heads": 2},
    "mamba": {"state_size": 4},
    "mamba2": {"heads": 4, "head_size": 8, "state_size": 8, "norm": None},
    "native_sparse": {"heads": 4, "kv_heads": 2, "block_size": 8, "window": 8, "selected_blocks": 2},
    "multi_latent": {"heads": 4},
    "short_conv": {},
    "matmul_free": {},
    "parallel": {
        "first": {"mixer": {"kind": "mamba2", "heads": 4, "head_size": 8, "state_size": 8, "norm": None}},
        "second": {"mixer": {"kind": "attention", "heads": 2}},
    },
}


def model_of(mixer="attention", ffn=None, repeats=2, elastic=None, **sizes):
    mixer = {"kind": mixer, **SIZES.get(mixer, {"heads": 4}), **sizes}
    blocks = {"layer": {"mixer": mixer, "ffn": ffn or {"kind": "swiglu", "hidden": 32}}}
    values = {"width": WIDTH, "vocab_size": 32, "blocks": blocks, "layout": ["layer"], "repeats": repeats}
    return validate(ModelSpec, values | {"elastic": elastic, "init_std": 0.2}).build()


def part_of(model, params, **parts):
    """A smaller model and its parameters."""
    choice = choose(model, parts)
    small = submodel_spec(model, choice).build()
    return small, submodel_parameters(model, small, params, choice.layers)


def emptied(model, params, small):
    """The parameters of a model, zero beyond what a smaller one of as many layers has."""

    def empty(whole, part, leaf):
        inside = np.zeros(whole.shape, bool)
        inside[tuple(slice(size) for size in part.shape)] = True
        return jnp.where(inside, leaf, 0.0)

    return jax.tree.map(empty, model.declarations, small.declarations, params, is_leaf=is_declaration)


# Where a norm is over all heads together, or the scale of logits is of the size of the state, more than zeros change.
WITHOUT_THE_REST = [
    ("attention", "heads"), ("attention", "ffn"), ("native_sparse", "heads"), ("mamba", "heads"), ("mamba", "state"),
    ("mamba2", "heads"), ("mamba2", "state"), ("linear_attention", "heads"), ("hedgehog", "heads"),
    ("retention", "heads"), ("gla", "heads"), ("gla", "rank"), ("delta_net", "heads"), ("gated_delta_net", "heads"),
    ("kda", "heads"), ("multi_latent", "heads"), ("rg_lru", "heads"), ("short_conv", "heads"), ("based", "heads"),
    ("parallel", "heads"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "axis"), WITHOUT_THE_REST)
def test_it_is_the_whole_without_the_rest(kind, axis, drawn):
    model = model_of(kind)
    choice = choose(model, {axis: 0.5})
    small = submodel_spec(model, choice).build()
    assert count_parameters(small.declarations) < count_parameters(model.declarations)

    @jax.jit
    def both(params):
        mine = submodel_parameters(model, small, params, choice.layers)
        return small.logits(mine, TOKENS), model.logits(emptied(model, params, small), TOKENS)

    found, expected = both(drawn(model))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_every_kind_says_what_it_can_be_cut_along():
    fixed = {"differential_attention", "hydra", "mamba_mixer"}
    for kind in MixerSpec.kinds.keys() - fixed:
        model = model_of(kind)
        (sizes, *_) = units_of(model)
        assert sizes["mixer"], kind
        for axis in sizes["mixer"]:
            small = submodel_spec(model, choose(model, {axis: 0.5})).build()
            assert count_parameters(small.declarations) < count_parameters(model.declarations), (kind, axis)
            assert small.flops_per_token(TIME) < model.flops_per_token(TIME), (kind, axis)


@pytest.mark.parametrize("parts", [{"heads": 0.5, "ffn": 0.25}, {"width": 0.5, "layers": 0.5}, {"ffn": [1, 0.25]}])
def test_gradients_are_those_of_the_slice(parts, drawn):
    """Through the whole model's parameters what is inside gets the smaller model's gradient, and the rest none."""
    model = model_of()
    choice = choose(model, parts)
    small = submodel_spec(model, choice).build()

    def sliced(params):
        return submodel_parameters(model, small, params, choice.layers)

    def loss(mine):
        return jnp.sum(jnp.sin(small.logits(mine, TOKENS)))

    @jax.jit
    def both(params):
        value, grads = jax.value_and_grad(lambda params: loss(sliced(params)))(params)
        return value, grads, sliced(grads), jax.value_and_grad(loss)(sliced(params))

    value, grads, found, (expected, inner) = both(drawn(model))
    assert value == pytest.approx(float(expected), abs=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, inner)
    total, its = (sum(np.sum(np.square(leaf)) for leaf in map(np.asarray, jax.tree.leaves(g))) for g in (grads, inner))
    assert total == pytest.approx(its, rel=1e-5)


def test_a_part_of_a_part_is_a_part(drawn):
    model = model_of(repeats=4, elastic={"ffn": [0.25, 0.5, 1], "heads": [0.5, 1], "layers": [0.25, 0.5, 1]})
    params = drawn(model)
    half, its = part_of(model, params, ffn=0.5, layers=0.5)
    assert half.spec.elastic.axes == {"ffn": (0.5, 1.0), "heads": (0.5, 1.0), "layers": (0.5, 1.0)}
    twice, twice_its = part_of(half, its, ffn=0.5, heads=0.5, layers=0.5)
    once, once_its = part_of(model, params, ffn=0.25, heads=0.5, layers=0.25)
    assert twice.spec == once.spec and twice.spec.elastic is None
    jax.tree.map(np.testing.assert_array_equal, twice_its, once_its)


def test_layers_keep_their_places(drawn):
    """Parts that go by their layer's number go by the one it had."""
    for kind in ("lightning", "hgrn2"):
        model = model_of(kind, repeats=4)
        params = drawn(model)
        small, mine = part_of(model, params, layers=[1, 3])
        assert small.spec.numbering.layers == (1, 3) and small.spec.numbering.of == 4
        skipped = jax.tree.map(lambda leaf: leaf, params)
        for half in ("mixer", "ffn"):
            inner = skipped["stack"]["segment_0"]["layer_0"][half]["inner"]
            output = inner["output" if half == "mixer" else "down"]
            output["weight"] = output["weight"].at[jnp.asarray([0, 2])].set(0.0)
        expected = jax.jit(model.logits)(skipped, TOKENS)
        np.testing.assert_allclose(jax.jit(small.logits)(mine, TOKENS), expected, rtol=1e-5, atol=1e-5)
        once_more, _ = part_of(small, mine, layers=[1])
        assert once_more.spec.numbering.layers == (3,)


def test_layers_of_unequal_parts_share_a_block(drawn):
    model = model_of(repeats=4)
    small, mine = part_of(model, drawn(model), ffn=[0.25, 0.5, 0.5, 1])
    assert small.spec.blocks["layer"].ffn.hidden == (8, 16, 16, 32)
    assert [part.layers for part in small.stack.segments] == [1, 2, 1]
    assert jax.eval_shape(small.logits, mine, TOKENS).shape == (2, TIME, 32)
    blocks = {"one": {"mixer": {"kind": "attention", "heads": 2}, "ffn": {"kind": "mlp", "hidden": 16}}}
    blocks["two"] = {"mixer": {"kind": "mamba"}, "ffn": {"kind": "mlp", "hidden": 16}}
    values = {"width": 16, "vocab_size": 32, "blocks": blocks, "layout": ["one", "two"], "repeats": 2}
    hybrid = validate(ModelSpec, values).build()
    small, _ = part_of(hybrid, drawn(hybrid), ffn={"two": 0.5}, state=0.25)
    assert small.spec.layout == ("one", "two") and small.spec.repeats == 2
    assert (small.spec.blocks["one"].ffn.hidden, small.spec.blocks["two"].ffn.hidden) == (16, 8)
    assert small.spec.blocks["two"].mixer.state_size == 4 and small.spec.blocks["one"] == hybrid.spec.blocks["one"]


def test_groups_of_heads_with_a_norm_of_their_own(drawn):
    model = model_of("mamba2", groups=2, norm="gate_first")
    params = drawn(model)
    small, mine = part_of(model, params, heads=0.5)
    assert small.layers[0].mixer.groups == 1 and small.layers[0].mixer.heads == 2
    expected = jax.jit(model.logits)(emptied(model, params, small), TOKENS)
    np.testing.assert_allclose(jax.jit(small.logits)(mine, TOKENS), expected, rtol=1e-5, atol=1e-5)


def test_experts(drawn):
    ffn = {"kind": "moe", "experts": 8, "top_k": 2, "expert": {"kind": "swiglu", "hidden": 16}}
    model = model_of(ffn=ffn | {"router": {"bias": True}})
    params = drawn(model)
    small, mine = part_of(model, params, experts=0.5, ffn=0.5)
    assert small.layers[0].ffn.experts == 4 and small.layers[0].ffn.expert.hidden == 8
    # Experts that are left out compute nothing, and no token would be sent to them.
    whole = emptied(model, params, small)
    router = whole["stack"]["segment_0"]["layer_0"]["ffn"]["inner"]["router"]
    router["bias"] = router["bias"].at[:, 4:].set(-1e4)
    expected = jax.jit(model.logits)(whole, TOKENS)
    np.testing.assert_allclose(jax.jit(small.logits)(mine, TOKENS), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="top_k: 2, but there are 1 experts"):
        part_of(model, params, experts=0.125)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"fnn": 0.5}, "fnn: no axis of a model; did you mean 'ffn'"),
        ({"state": 0.5}, "state: no layer of the model is elastic along it"),
        ({"ffn": 0.0}, "ffn: a part is above 0 and at most 1; got 0"),
        ({"ffn": 1.5}, "ffn: a part is above 0 and at most 1; got 1.5"),
        ({"ffn": 0.3}, "ffn of layer 0: 0.3 of 32 is no whole number; nearest: 0.28125 or 0.3125"),
        ({"heads": 0.25}, "heads of layer 0: 0.25 of 2 is no whole number; nearest: 0.5"),
        ({"ffn": [0.5, 1]}, "ffn: 2 values, but 4 layers have the axis"),
        ({"ffn": {}}, "ffn: it names no block; valid: layer"),
        ({"ffn": {"laier": 0.5}}, "ffn.laier: no block with this axis has the name; did you mean 'layer'"),
        ({"layers": [0, 4]}, "layers: there is no layer 4; they are 0 to 3"),
        ({"layers": [1, 1]}, "layers: name each layer to keep once"),
    ],
)  # fmt: skip
def test_faults(parts, said):
    with pytest.raises(ConfigError, match=said):
        choose(model_of(repeats=4), parts)


def test_what_a_model_is_trained_for():
    model = model_of(repeats=4, elastic={"ffn": [0.25, 0.5, 1]})
    with pytest.raises(ConfigError, match=r"ffn: the model is trained for 0.25, 0.5, 1 of it, and not for 0.75"):
        choose(model, {"ffn": 0.75})
    for grid, said in {
        (0.5, 1.5): "above 0 and at most 1; got 1.5",
        (0.5, 0.25, 1): "ascend and end with 1; got 0.5, 0.25, 1",
        (0.25, 0.5): "ascend and end with 1",
    }.items():
        with pytest.raises(ConfigError, match=f"elastic.ffn: .*{said}"):
            model_of(elastic={"ffn": grid})
