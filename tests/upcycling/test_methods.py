"""Mixtures of experts made of dense channel mixers."""

import jax
import numpy as np
import pytest
from pydantic import TypeAdapter

from efficient_lm.errors import ConfigError, DataError
from efficient_lm.models.layered import layer_parameters
from efficient_lm.spec import OneOf
from efficient_lm.upcycling.assignment import balanced, most_active, universal
from efficient_lm.upcycling.base import UpcyclingSpec
from efficient_lm.upcycling.conversion import upcycled, upcycled_spec
from efficient_lm.upcycling.statistics import clustered, domains_seen, labelled

METHOD = TypeAdapter(OneOf[UpcyclingSpec])
DENSE = [
    {"kind": "swiglu", "hidden": 24, "bias": True, "output_multiplier": 0.5},
    {"kind": "mlp", "hidden": 24, "bias": True},
]


def method(kind="copy", **options):
    return METHOD.validate_python({"kind": kind, **options})


def converted(made, source, how, domains=None):
    spec, params = upcycled(source.model, source.params, how, jax.random.key(5), domains)
    return made(spec, params)


def test_what_was_nested_is_so_where_experts_have_all_units(made, dense_spec):
    elastic = {"ffn": [0.5, 1], "heads": [0.5, 1]}
    source = made(dense_spec(DENSE[0], layers=2, elastic=elastic), params={})
    kept = upcycled_spec(source.model, method(experts=2)).elastic
    assert kept.axes == {"ffn": (0.5, 1.0), "heads": (0.5, 1.0)}
    divided = method("split", by="contiguous", experts=2)
    assert upcycled_spec(source.model, divided).elastic.axes == {"heads": (0.5, 1.0)}
    alone = made(dense_spec(DENSE[0], layers=2, elastic={"ffn": [0.5, 1]}), params={})
    assert upcycled_spec(alone.model, divided).elastic is None


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("ffn", DENSE, ids=["gated", "plain"])
def test_copies_compute_what_the_dense_model_did(made, dense_spec, ffn):
    source = made(dense_spec(ffn))
    result = converted(made, source, method(experts=4, top_k=2, router_std=1.0))
    close(result.logits(), source.logits())
    assert [layer.ffn.kind for layer in result.model.layers] == ["moe"] * 3
    assert list(result.spec.blocks) == ["layer_moe"] and result.spec.repeats == 3
    weights = [values["ffn"]["inner"]["router"]["weight"] for values in layer_parameters(result.model, result.params)]
    assert (
        float(np.std(np.stack(weights))) == pytest.approx(1.0, rel=0.2) and np.abs(weights[0] - weights[1]).max() > 0.1
    )


@pytest.mark.slow
def test_noise_parts_the_copies(made, dense_spec):
    source = made(dense_spec(DENSE[1]))
    result = converted(made, source, method(experts=2, top_k=1, noise=0.1, layers=[1]))
    up = layer_parameters(result.model, result.params)[1]["ffn"]["inner"]["experts"]["up"]["weight"]
    old = layer_parameters(source.model, source.params)[1]["ffn"]["inner"]["up"]["weight"]
    for copy in up:
        assert float(np.std(copy - old)) == pytest.approx(0.1 * float(np.std(old)), rel=0.2)
    assert np.abs(up[0] - up[1]).max() > 0


@pytest.mark.quick_for("{'by': 'random'}-gated")
@pytest.mark.parametrize("ffn", DENSE, ids=["gated", "plain"])
@pytest.mark.parametrize("options", [{"by": "random"}, {"by": "contiguous", "shared": 0.25}], ids=str)
def test_all_parts_with_weights_of_one_compute_what_the_dense_model_did(made, dense_spec, ffn, options):
    source = made(dense_spec(ffn))
    result = converted(made, source, method("split", experts=3, top_k=3, router_std=0, layers=[0, 2], **options))
    close(result.logits(), source.logits())
    mixture = result.model.layers[0].ffn
    assert mixture.router.scale == 3 and mixture.expert.hidden == (6 if "shared" in options else 8)
    assert (mixture.shared and mixture.shared.hidden) == (6 if "shared" in options else None)
    assert result.spec.layout == ("layer_moe", "layer", "layer_moe")


def test_units_go_where_they_are_active(made, dense_spec, rows):
    source = made(dense_spec({"kind": "swiglu", "hidden": 24}, layers=2))
    domains = labelled([rows(4, 0, 8), rows(4, 16, 31)])
    seen = domains_seen(source.model, source.params, domains)
    how = method("split", by="domains", rows="domains", experts=2, top_k=1)
    result = converted(made, source, how, domains)
    layers = zip(layer_parameters(result.model, result.params), seen, strict=True)
    for number, (values, found) in enumerate(layers):
        inner, old = values["ffn"]["inner"], layer_parameters(source.model, source.params)[number]["ffn"]["inner"]
        own = balanced(found.activity)
        np.testing.assert_array_equal(inner["experts"]["down"]["weight"], np.asarray(old["down"]["weight"])[own])
        np.testing.assert_array_equal(inner["router"]["weight"], found.inputs.T)
        share = found.activity / found.activity.sum(axis=0)
        # More than chance: each expert's units are more active in its own domain.
        assert min(share[domain, own[domain]].mean() for domain in range(2)) > 0.52


def test_experts_may_share_units_as_in_read_me(made, dense_spec, rows):
    source = made(dense_spec({"kind": "swiglu", "hidden": 24}, layers=1))
    domains = clustered(source.params, rows(8, 0, 31), 3)
    result = converted(made, source, method("split", experts=3, top_k=1, hidden=16, shared=0.25), domains)
    assert result.params["stack"]["segment_0"]["layer_0"]["ffn"]["inner"]["experts"]["down"]["weight"].shape == (
        1, 3, 16, 16,
    )  # fmt: skip


def test_a_measurement_is_a_mean_over_tokens(made, dense_spec, rows):
    block = {"mixer": None, "ffn": {"kind": "mlp", "hidden": 8}}
    source = made({**dense_spec({}, layers=1), "blocks": {"layer": block}})
    batch = rows(3, 0, 31)
    (seen,) = domains_seen(source.model, source.params, labelled([batch, rows(2, 0, 31, 1)]))
    half = jax.tree.map(np.asarray, layer_parameters(source.model, source.params)[0]["ffn"])
    x = np.asarray(source.params["embedding"]["tokens"])[batch["tokens"]]
    x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * half["input_norm"]["scale"]
    real = batch["segment_ids"] > 0
    hidden = np.abs(jax.nn.gelu(x @ half["inner"]["up"]["weight"], approximate=False))[real].mean(axis=0)
    np.testing.assert_allclose(seen.activity[0], hidden, rtol=1e-4)
    unit = (x / np.linalg.norm(x, axis=-1, keepdims=True))[real].mean(axis=0)
    np.testing.assert_allclose(seen.inputs[0], unit / np.linalg.norm(unit), rtol=1e-3, atol=1e-5)


def test_rows_of_like_content_are_a_cluster(made, dense_spec, rows):
    source = made(dense_spec({"kind": "mlp", "hidden": 8}, layers=1))
    parts = [rows(5, 0, 4), rows(5, 12, 16), rows(5, 26, 30)]
    found = clustered(source.params, labelled(parts).batch, 3)
    groups = found.labels.reshape(3, 5)
    assert np.ptp(groups, axis=1).max() == 0 and len(set(groups[:, 0])) == 3
    with pytest.raises(DataError, match="there are 5 rows of text, too few to be 6 groups"):
        clustered(source.params, parts[0], 6)


def test_assignments():
    activity = np.array([[9.0, 5, 1, 1, 4, 3], [1, 4, 8, 7, 4, 3]])
    np.testing.assert_array_equal(balanced(activity), [[0, 1, 4], [2, 3, 5]])
    np.testing.assert_array_equal(most_active(activity, 2), [[0, 1], [2, 3]])
    np.testing.assert_array_equal(universal(activity, 2), [1, 4])


def test_layers_and_a_pyramid(made, dense_spec):
    source = made(dense_spec({"kind": "mlp", "hidden": 8}, layers=4))
    spec = upcycled_spec(source.model, method(every=2, experts=[2, 4], top_k=1))
    assert [getattr(layer.ffn, "experts", 0) for layer in spec.layers()] == [0, 2, 0, 4]
    assert spec.layout == ("layer", "layer_moe") and spec.blocks["layer_moe"].ffn.experts == (2, 4)
    result = converted(made, source, method(every=2, experts=[2, 4], top_k=1))
    close(result.logits(), source.logits())


def test_one_router_in_front(made, dense_spec):
    source = made(dense_spec({"kind": "mlp", "hidden": 8}))
    result = converted(made, source, method(experts=4, pregate={"width": 8}))
    assert result.params["pregate"]["scores"]["weight"].shape == (8, 4) and result.spec.pregate.experts == 4
    close(result.logits(), source.logits())


FAULTS = [
    ({"experts": 2, "top_k": 3}, "method.top_k: 3 of 2 experts; at most 2"),
    ({"layers": [1], "every": 2}, "method.every: method.layers says which"),
    ({"layers": [3]}, "method.layers: there is no 3; valid: 0, 1, 2"),
    ({"every": 4}, "method.every: none of the 3 layers is the last of 4; at most 3"),
    ({"kind": "split", "by": "random", "experts": 5}, "method.experts: 24 units do not divide among 5; .*4, 6"),
    ({"kind": "split", "by": "random", "hidden": 4}, "method.hidden: 4 looks at texts"),
    ({"kind": "split", "by": "random", "rows": "domains"}, "method.rows: domains looks at texts"),
    ({"kind": "split", "hidden": 25}, "method.hidden: 25 of 24 units; at most 24"),
    ({"rows": "domains", "pregate": {}}, "method.rows: with method.pregate"),
    ({"pregate": {"widht": 3}}, "model.pregate.widht: unknown key; did you mean 'width'"),
]


@pytest.mark.parametrize(("options", "words"), FAULTS)
def test_faults(made, dense_spec, options, words):
    source = made(dense_spec({"kind": "swiglu", "hidden": 24}), params={})
    with pytest.raises(ConfigError, match=words):
        upcycled_spec(source.model, method(**options))


def test_what_cannot_be_made_experts(made, dense_spec):
    ternary = made(dense_spec({"kind": "swiglu", "hidden": 24, "ternary": True}), params={})
    with pytest.raises(ConfigError, match="ternary weights have one scale"):
        upcycled_spec(ternary.model, method("split", by="random"))
    sparse = made(dense_spec({"kind": "swiglu", "hidden": 24, "sparsity": 0.5}), params={})
    with pytest.raises(ConfigError, match=r"ffn.sparsity=0.5 goes by the mean .* method=copy keeps them together"):
        upcycled_spec(sparse.model, method("split", by="random"))
    assert upcycled_spec(sparse.model, method(experts=2)).layers()[0].ffn.expert.sparsity == 0.5
    mixtures = made(upcycled_spec(ternary.model, method(experts=2)), params={})
    with pytest.raises(ConfigError, match="checkpoint: no layer has a dense ffn to make experts of"):
        upcycled_spec(mixtures.model, method(experts=2))
