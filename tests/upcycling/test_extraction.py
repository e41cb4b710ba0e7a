"""Models with some of their experts left out."""

import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.evaluation.routing import Routing, super_experts
from efficient_lm.upcycling.extraction import extracted, important_experts, listed_experts

MOE = {"kind": "moe", "experts": 4, "top_k": 2, "expert": {"kind": "mlp", "hidden": 8}}


@pytest.fixture(scope="module")
def source(made, dense_spec):
    ffn = {**MOE, "router": {"bias": True, "correction": True}, "zero_experts": {"copies": 1}}
    elastic = {"experts": [0.5, 1], "ffn": [0.5, 1]}
    return made(dense_spec({**ffn, "shared": {"kind": "mlp", "hidden": 8}}, layers=2, elastic=elastic))


def masked(model, params, kept):
    """The same model, its routers unable to choose experts that are not kept."""
    gone = np.array([[expert < 4 and expert not in keep for expert in range(5)] for keep in kept])
    layer = params["stack"]["segment_0"]["layer_0"]
    router = layer["ffn"]["inner"]["router"]
    router = router | {name: np.where(gone, -1e9, router[name]) for name in ("bias", "correction")}
    inner = layer["ffn"]["inner"] | {"router": router}
    return {**params, "stack": {"segment_0": {"layer_0": layer | {"ffn": layer["ffn"] | {"inner": inner}}}}}


@pytest.mark.parametrize("wanted", [[2, 0], [[3, 1, 0], [1, 2]]], ids=str)
def test_what_is_left_computes_as_if_routers_could_not_choose_the_others(made, source, wanted):
    kept = listed_experts(source.model, wanted)
    spec, params = extracted(source.model, source.params, kept)
    assert [layer.ffn.experts for layer in spec.layers()] == [len(experts) for experts in kept]
    assert spec.elastic.axes == {"ffn": (0.5, 1.0)}
    want = made(source.spec, masked(source.model, source.params, kept)).logits()
    np.testing.assert_allclose(made(spec, params).logits(), want, atol=2e-5 * np.abs(want).max())


def test_one_router_in_front_keeps_its_scores(made, dense_spec):
    ffn = {**MOE, "router": {"pregated": True, "normalize": True}}
    whole = made(dense_spec(ffn, layers=2, pregate={"experts": 4}))
    spec, params = extracted(whole.model, whole.params, listed_experts(whole.model, [1, 3]))
    assert spec.pregate.experts == 2
    np.testing.assert_array_equal(
        params["pregate"]["scores"]["weight"], whole.params["pregate"]["scores"]["weight"][:, [1, 3]]
    )
    with pytest.raises(ConfigError, match="all layers share one router"):
        extracted(whole.model, whole.params, listed_experts(whole.model, [[0, 1], [2, 3]]))


def test_the_most_important_stay(made, dense_spec):
    model = made(dense_spec({**MOE, "top_k": 1}, layers=2), params={}).model
    flat = np.ones(4)
    layers = [
        Routing(*routes_of([1, 5, 3, 2]), flat, np.array([9.0, 1, 2, 3]), 1),
        Routing(*routes_of([4, 0, 0, 9]), flat, flat * [5, 6, 7, 0.1], 1),
    ]
    assert important_experts(model, layers, 2, "load") == [(1, 2), (0, 3)]
    assert important_experts(model, layers, 2, "weight") == [(0, 1), (0, 3)]
    assert important_experts(model, layers, 2, "reconstruction") == [(0, 3), (1, 2)]
    assert important_experts(model, layers, 2, "reconstruction", uneven=True) == [(0,), (0, 1, 2)]
    # The Super Expert stays, unless it need not.
    loud = Routing(*routes_of([4, 0, 0, 9]), np.array([1.0, 50, 1, 1]), flat * [5, 6, 7, 0.1], 1)
    assert [(place["layer"], place["expert"]) for place in super_experts([layers[0], loud])] == [(1, 1)]
    assert important_experts(model, [layers[0], loud], 2, "load") == [(1, 2), (1, 3)]
    assert important_experts(model, [layers[0], loud], 2, "load", spare_super_experts=False) == [(1, 2), (0, 3)]


def routes_of(loads):
    routes = np.repeat(np.arange(4), loads)[None, :, None]
    return routes, 1.0 / (1.0 + routes) ** 2, np.zeros(routes.shape, bool)


def test_groups_of_experts_keep_as_many_each(made, dense_spec):
    ffn = {**MOE, "router": {"groups": 2, "top_groups": 1}}
    model = made(dense_spec(ffn, layers=1)).model
    layers = [Routing(*routes_of([9, 8, 1, 2]), np.ones(4), np.ones(4), 2)]
    assert important_experts(model, layers, 2, "load") == [(0, 3)]
    with pytest.raises(ConfigError, match="a multiple of 2, and uneven=false"):
        important_experts(model, layers, 3, "load")
    with pytest.raises(ConfigError, match="among 2 groups of 2; keep as many of each"):
        extracted(model, made(model.spec).params, listed_experts(model, [0, 1, 2]))


FAULTS = [
    ([0, 4], "experts: there is no expert 4 in layer 0; they are 0 to 3"),
    ([0, 0], "names an expert twice"),
    ([[0], [1], [2]], "experts: 3 lists, but 2 layers have experts"),
    ([], "experts: 1 would be left in layer 0, and a token takes 2; keep at least 2"),
]


@pytest.mark.parametrize(("wanted", "words"), FAULTS)
def test_faults(source, wanted, words):
    with pytest.raises(ConfigError, match=words):
        extracted(source.model, source.params, listed_experts(source.model, wanted))


def test_a_dense_model_has_nothing_to_drop(made, dense_spec):
    with pytest.raises(ConfigError, match="checkpoint: no layer has experts"):
        listed_experts(made(dense_spec({"kind": "mlp"}), params={}).model, [0])
