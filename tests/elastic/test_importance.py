"""Units in order of what they are worth: nothing that the model computes changes, and what is first is worth more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.elastic.choices import choose, units_of
from efficient_lm.elastic.importance import layer_worth, measure_of, most_important, unit_worth
from efficient_lm.elastic.submodels import submodel_parameters, submodel_spec
from efficient_lm.elastic.units import ordered, unit_groups
from efficient_lm.errors import ConfigError
from efficient_lm.models.context import Context
from efficient_lm.models.depth.selected import highest
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.layered import layer_parameters
from efficient_lm.models.mixers.base import MixerSpec
from efficient_lm.validation import validate

WIDTH, TIME = 32, 16
TOKENS = jax.random.randint(jax.random.key(9), (2, TIME), 0, 32)
MIXTURE = {
    "kind": "moe", "experts": 4, "top_k": 2, "expert": {"kind": "swiglu", "hidden": 16},
    "shared": {"kind": "swiglu", "hidden": 24}, "router": {"bias": True, "correction": True},
}  # fmt: skip
SIZES = {
    "attention": {"heads": 4, "kv_heads": 2, "qk_norm": {"kind": "rmsnorm"}, "qk_norm_over": "all", "sink_logit": True},
    "mamba": {"state_size": 4},
    "mamba2": {"heads": 4, "head_size": 8, "state_size": 8, "groups": 2},
    "native_sparse": {"heads": 4, "kv_heads": 2, "block_size": 8, "window": 8, "selected_blocks": 2},
    "multi_latent": {"heads": 4, "query_rank": 8},
    "short_conv": {},
    "matmul_free": {},
    "parallel": {
        "first": {"mixer": {"kind": "mamba2", "heads": 4, "head_size": 8, "state_size": 8}},
        "second": {"mixer": {"kind": "attention", "heads": 2}},
    },
}
FIXED = {("retention", "heads"), ("lightning", "heads")}
WITHOUT_AXES = {"differential_attention", "hydra", "mamba_mixer"}


TOGETHER = [
    ("attention", "mamba", "mamba2", "short_conv"),
    ("gated_delta_net", "gla", "hgrn2", "rg_lru", "matmul_free", "linear_attention"),
    ("native_sparse", "multi_latent", "parallel", "based", "hedgehog", "kda", "delta_net"),
]


def model_of(*kinds, ffn=None, repeats=2, elastic=None, depth=None):
    """Layers of these kinds one after the other, two of each unless there are many."""
    ffn = ffn or {"kind": "swiglu", "hidden": 32}
    kinds = kinds or ("attention",)
    blocks = {
        kind: {"mixer": {"kind": kind, **SIZES.get(kind, {"heads": 4})}, "ffn": ffn, "depth": depth} for kind in kinds
    }
    repeats = 1 if len(kinds) > 2 else repeats
    values = {"width": WIDTH, "vocab_size": 32, "blocks": blocks, "layout": list(kinds), "repeats": repeats}
    return validate(ModelSpec, values | {"elastic": elastic, "init_std": 0.2}).build()


def fresh(model):
    """Parameters of which none is like another, scales and biases neither."""
    params = jax.jit(model.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(
        tree, [leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    )


def batch_of(tokens=TOKENS):
    tokens = np.asarray(tokens)
    ones = np.ones(tokens.shape, np.int32)
    return {
        "tokens": tokens, "targets": np.roll(tokens, -1, 1), "segment_ids": ones,
        "positions": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        "weights": ones.astype(np.float32),
    }  # fmt: skip


def random_worth(model):
    """Any worth; of units of many experts, one for each expert."""
    rng, found = np.random.default_rng(2), []
    for groups in unit_groups(model):
        shapes = {group: (4, group.count) if group.path[-1] == "experts" else (group.count,) for group in groups}
        found.append({group: rng.random(shape) for group, shape in shapes.items() if not group.fixed})
    return found


KINDS = sorted(MixerSpec.kinds.keys() - WITHOUT_AXES - {kind for kind, _ in FIXED})


def test_all_kinds_are_here():
    assert sorted(kind for kinds in TOGETHER for kind in kinds) == KINDS


@pytest.mark.quick_for("attention")
@pytest.mark.parametrize("kinds", TOGETHER, ids=lambda kinds: kinds[0])
def test_the_function_stays(kinds):
    """Along every axis that the kinds have, all at once."""
    model = model_of(*kinds)
    params, worth = fresh(model), random_worth(model)
    for mine, sizes in zip(worth, units_of(model), strict=True):
        assert {group.axis for group in mine} == {axis for half in sizes.values() for axis in half}
    moved = ordered(model, params, worth)
    layers = zip(layer_parameters(model, params), layer_parameters(model, moved), strict=True)
    for before, after in layers:
        pairs = zip(jax.tree.leaves(before["mixer"]), jax.tree.leaves(after["mixer"]), strict=True)
        assert sum(float(jnp.abs(a - b).max()) > 1e-3 for a, b in pairs) >= 2
    logits = jax.jit(model.logits)
    expected = logits(params, TOKENS)
    np.testing.assert_allclose(logits(moved, TOKENS), expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_what_goes_by_its_place_stays():
    for kind, axis in sorted(FIXED):
        model = model_of(kind)
        fixed = {(group.kind, group.axis) for group in unit_groups(model)[0] if group.fixed}
        assert fixed == {(kind, axis)}
        worth = [{group: np.arange(group.count) for group in layer} for layer in unit_groups(model)]
        with pytest.raises(ConfigError, match=f"order: heads of '{kind}' cannot change places: each forgets at a rate"):
            ordered(model, fresh(model), worth)
    assert not any(group.fixed for layer in unit_groups(model_of(*KINDS)) for group in layer)


def scores(worth, axis, part="inner"):
    return [
        values for layer in worth for group, values in layer.items() if group.axis == axis and group.path[-1] == part
    ]


def test_activation_is_what_the_output_map_reads():
    model = model_of("attention", ffn=MIXTURE)
    params, batch = fresh(model), batch_of()
    batch["segment_ids"] = np.where(np.arange(TIME) < TIME - 4, batch["segment_ids"], 0)
    down = params["stack"]["segment_0"]["layer_0"]["ffn"]["inner"]["shared"]["gate_up"]["weight"]
    params["stack"]["segment_0"]["layer_0"]["ffn"]["inner"]["shared"]["gate_up"]["weight"] = down.at[..., 5].set(0.0)
    query = params["stack"]["segment_0"]["layer_0"]["mixer"]["inner"]["key_value"]["weight"]
    params["stack"]["segment_0"]["layer_0"]["mixer"]["inner"]["key_value"]["weight"] = query.at[..., 0, :].multiply(3.0)
    worth = unit_worth(model, params, batch, {"ffn", "heads"}, "activation")
    for shared, experts, heads in zip(
        scores(worth, "ffn", "shared"), scores(worth, "ffn", "experts"), scores(worth, "heads"), strict=True
    ):
        assert shared.shape == (24,) and shared[5] == 0 and np.all(np.delete(shared, 5) > 0)
        assert experts.shape == (4, 16) and np.all(experts >= 0) and np.all(experts.sum(axis=1) > 0)
        assert heads.shape == (2,) and heads[0] > heads[1]
    # Padding is not looked at.
    batch["tokens"] = np.where(batch["segment_ids"] > 0, batch["tokens"], 1)
    again = unit_worth(model, params, batch, {"heads"}, "activation")
    np.testing.assert_allclose(scores(again, "heads"), scores(worth, "heads"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["top_k", "causal"])
def test_activation_is_of_the_tokens_that_run_a_layer(selection):
    """With mixture of depths; what the others hold, and padding, are of no concern."""
    depth = {"kind": "mixture_of_depths", "capacity": 0.5, "selection": selection, "decide": "router"}
    model = model_of(repeats=1, depth=depth)
    params, batch = fresh(model), batch_of()
    batch["segment_ids"] = np.where(np.arange(TIME) < TIME - 4, batch["segment_ids"], 0)
    worth = unit_worth(model, params, batch, {"ffn", "heads"}, "activation")
    # The router of the one layer reads what the tokens are, and so is what it decides for each known without the rule.
    plain = model_of(repeats=1)
    layer = params["stack"]["segment_0"]["layer_0"]
    inside = params | {"stack": {"segment_0": {"layer_0": {name: layer[name] for name in ("mixer", "ffn")}}}}
    x = model.entered(params, batch["tokens"], Context.rows(2, TIME))[0]
    rule = layer["depth"]
    normed = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * rule["norm"]["scale"][0]
    decided = normed @ rule["router"]["weight"][0] + rule["router"]["bias"][0]
    real = batch["segment_ids"] > 0
    runs = highest(decided, TIME // 2, real).mask(TIME) if selection == "top_k" else real & (decided > 0)
    alone = batch | {"segment_ids": np.asarray(runs, np.int32)}
    expected = unit_worth(plain, inside, alone, {"ffn", "heads"}, "activation")
    assert 2 < int(runs.sum()) < int(real.sum())
    for found, wanted in zip(worth[0].values(), expected[0].values(), strict=True):
        np.testing.assert_allclose(found / found.sum(), wanted / wanted.sum(), rtol=1e-4)
    # What is cut is still a model with the rule.
    kept, parts = most_important(model, params, {"ffn": 0.5, "heads": 0.5}, None, lambda: batch)
    small = submodel_spec(model, choose(model, parts)).build()
    mine = submodel_parameters(model, small, kept, (0,))
    logits, whole = small.logits(mine, TOKENS), model.logits(ordered(model, params, worth), TOKENS)
    assert small.layers[0].depth == model.layers[0].depth and bool(jnp.isfinite(logits).all())
    np.testing.assert_allclose(model.logits(params, TOKENS), whole, atol=1e-5 * float(jnp.abs(whole).max()))


@pytest.mark.slow
def test_weight_and_gradient():
    model = model_of("mamba", ffn=MIXTURE)
    params, batch = fresh(model), batch_of()
    first = layer_parameters(model, params)[0]
    by_weight = unit_worth(model, params, None, {"state", "experts"}, "weight")
    inner = first["mixer"]["inner"]
    expected = jnp.sum(inner["A_log"] ** 2, axis=0) + jnp.sum(inner["input_output"]["weight"] ** 2, axis=(0, 1))
    np.testing.assert_allclose(scores(by_weight, "state")[0], expected, rtol=1e-5)
    # An expert that no token is sent to has no gradient but in its router.
    biased = jax.tree.map(lambda leaf: leaf, params)
    router = biased["stack"]["segment_0"]["layer_0"]["ffn"]["inner"]["router"]
    router["correction"] = router["correction"].at[:, 2].set(-1e3)
    worth = unit_worth(model, biased, batch, {"state", "experts"}, "activation")
    assert {measure_of(group, "activation") for group in worth[0]} == {"gradient"}
    for values in scores(worth, "experts"):
        assert values.shape == (4,) and values.argmin() == 2
    assert all(values.shape == (4,) and np.all(values > 0) for values in scores(worth, "state"))


def test_layers_by_what_they_change():
    model = model_of(repeats=3)
    params, batch = fresh(model), batch_of()
    for half, name in (("mixer", "output"), ("ffn", "down")):
        inner = params["stack"]["segment_0"]["layer_0"][half]["inner"]
        inner[name]["weight"] = inner[name]["weight"].at[0].set(0.0)
    worth = layer_worth(model, params, batch)
    assert worth.shape == (3,) and worth[0] == pytest.approx(0, abs=1e-5) and np.all(worth[1:] > 0.01)
    same, parts = most_important(model, params, {"layers": 2 / 3}, None, lambda: batch)
    assert parts == {"layers": [1, 2]} and same is params
    assert most_important(model, params, {"layers": 2 / 3}, "none", None)[1] == {"layers": 2 / 3}
    assert most_important(model, params, {"layers": [0, 1]}, None, None)[1] == {"layers": [0, 1]}
    for order in ("activation", None):
        kept = most_important(model, params, {"ffn": 0.5}, order, lambda: batch)[0]
        small = submodel_spec(model, choose(model, {"ffn": 0.5})).build()
        mine = submodel_parameters(model, small, kept, (0, 1, 2))
        worth = unit_worth(model, params, batch, {"ffn"}, "activation")
        best = np.argsort(-scores(worth, "ffn")[1], kind="stable")[:16]
        whole = layer_parameters(model, params)[1]["ffn"]["inner"]["down"]["weight"]
        np.testing.assert_array_equal(layer_parameters(small, mine)[1]["ffn"]["inner"]["down"]["weight"], whole[best])


@pytest.mark.slow
def test_what_is_measured_is_said(caplog):
    caplog.set_level("INFO", logger="efficient_lm")
    model = model_of("retention", "mamba", "attention")
    params, batch = fresh(model), batch_of()
    moved, _ = most_important(model, params, {"heads": 0.5, "state": 0.5}, None, lambda: batch)
    assert "heads of 'retention': the first, for they cannot change places: each forgets at a rate" in caplog.text
    assert "state of 'mamba': by gradient, for no map reads these units by themselves" in caplog.text
    before, after = (layer_parameters(model, values) for values in (params, moved))
    jax.tree.map(np.testing.assert_array_equal, before[0]["mixer"], after[0]["mixer"])
    for order, parts, said in (
        ("activation", {"heads": 0.5}, "order: heads of 'retention' cannot change places"),
        ("activations", {"ffn": 0.5}, "order: activations is none; did you mean 'activation'"),
        ("weight", {"ffn": 0.3}, "ffn of layer 0: 0.3 of 32 is no whole number"),
    ):
        with pytest.raises(ConfigError, match=said):
            most_important(model, params, parts, order, None)


def test_what_a_model_is_trained_for_keeps_its_order():
    model = model_of(elastic={"ffn": [0.5, 1], "layers": [0.5, 1]})
    params = fresh(model)
    assert most_important(model, params, {"ffn": 0.5, "layers": 0.5, "width": 0.5}, None, None)[0] is params
    with pytest.raises(ConfigError, match="order: the model is trained so that the first of ffn are the ones to keep"):
        most_important(model, params, {"ffn": 0.5}, "activation", None)


@pytest.mark.slow
def test_the_function_of_experts_stays():
    model = model_of("short_conv", ffn=MIXTURE)
    params = fresh(model)
    moved, logits = ordered(model, params, random_worth(model)), jax.jit(model.logits)
    inner, before = (layer_parameters(model, values)[0]["ffn"]["inner"] for values in (moved, params))
    for name in ("weight", "bias", "correction"):
        assert not np.array_equal(inner["router"][name], before["router"][name])
    expected = logits(params, TOKENS)
    np.testing.assert_allclose(logits(moved, TOKENS), expected, atol=1e-5 * float(jnp.abs(expected).max()))
