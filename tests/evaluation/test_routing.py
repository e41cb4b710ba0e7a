"""What is measured of routers and experts, against the same figures worked out by other means."""

import jax
import numpy as np
import pytest

from efficient_lm.evaluation.routing import Routing, agreement, first_choices, routing, super_experts
from efficient_lm.evaluation.routing_report import figures, layer_figures, routing_text, token_table
from efficient_lm.models.language_model import ModelSpec

WIDTH, TIME, VOCAB = 16, 20, 17
FFN = {"kind": "moe", "experts": 3, "top_k": 2, "expert": {"kind": "mlp", "hidden": 8, "bias": True}}


def batch(rows=3):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (rows, TIME)).astype(np.int32)
    segments = np.ones((rows, TIME), np.int32)
    segments[-1, 15:] = 0
    return {
        "tokens": tokens,
        "segment_ids": segments,
        "positions": np.tile(np.arange(TIME, dtype=np.int32), (rows, 1)),
    }


@pytest.fixture(scope="module")
def model(drawn):
    blocks = {"dense": {"mixer": None, "ffn": {"kind": "mlp", "hidden": 8}}, "experts": {"mixer": None, "ffn": FFN}}
    spec = {"width": WIDTH, "vocab_size": VOCAB, "blocks": blocks, "layout": ["experts", "dense"], "embedding_std": 1.0}
    model = ModelSpec.model_validate(spec).build()
    return model, drawn(model)


def test_figures_are_those_of_experts_one_by_one(model):
    model, params = model
    rows = batch()
    found, nothing = routing(model, params, rows)
    assert nothing is None and found.routes.shape == (3, TIME, 2) and not found.dropped.any()
    half = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), params["stack"]["segment_0"]["layer_0"]["ffn"])
    x = np.asarray(params["embedding"]["tokens"], np.float64)[rows["tokens"]]
    x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * half["input_norm"]["scale"]
    inner, real = half["inner"], rows["segment_ids"] > 0
    scores = np.exp(x @ inner["router"]["weight"])
    scores /= scores.sum(axis=-1, keepdims=True)
    order = np.argsort(-scores, axis=-1)[..., :2]
    np.testing.assert_array_equal(found.routes, np.where(real[..., None], order, -1))
    np.testing.assert_array_equal(found.first, np.where(real, order[..., 0], -1))
    for expert in range(3):
        values = {name: {key: leaf[expert] for key, leaf in part.items()} for name, part in inner["experts"].items()}
        hidden = np.asarray(jax.nn.gelu(x @ values["up"]["weight"] + values["up"]["bias"], approximate=False))
        y = hidden @ values["down"]["weight"] + values["down"]["bias"]
        taken = (found.routes == expert).any(axis=-1)
        weights = (found.weights * (found.routes == expert)).sum(axis=-1)
        assert found.load[expert] == taken.sum()
        np.testing.assert_allclose(found.weight[expert], scores[..., expert][taken].sum(), rtol=1e-5)
        np.testing.assert_allclose(found.peaks[expert], np.abs(y[taken]).max(), rtol=1e-4)
        error = np.square(weights[..., None] * y).sum()
        np.testing.assert_allclose(found.contribution[expert], error, rtol=1e-4)


def test_routes_agree_with_themselves_and_not_with_others(model, drawn):
    model, params = model
    other = drawn(model, seed=9)
    same, changed = agreement(model, params, [(1, params), (2, other)], batch())
    assert (same["step"], same["agreement"]) == (1, {0: 1.0})
    now, then = (routing(model, values, batch())[0].first for values in (params, other))
    assert changed["agreement"][0] == pytest.approx(np.mean(then[now >= 0] == now[now >= 0]))


def made(routes, weights=None, dropped=None, peaks=None, experts=4):
    routes = np.asarray(routes)
    weights = np.ones(routes.shape) if weights is None else np.asarray(weights)
    dropped = np.zeros(routes.shape, bool) if dropped is None else dropped
    peaks = np.ones(experts) if peaks is None else np.asarray(peaks, float)
    return Routing(routes, weights, dropped, peaks, np.ones(len(peaks)), routes.shape[-1])


def test_a_table_of_tokens():
    tokens = np.array([[0, 1, 2, 2], [0, 1, 3, 2], [0, 0, 1, 2]])
    first = np.array([[2, 1, 0, 0], [2, 3, 2, 0], [2, 2, 1, -1]])
    # Rows 0 and 2 say 0 → 2, 1 → 1, 2 → 0; token 3 gets their commonest, 2. Row 1: right but for token 1.
    assert token_table(tokens, first) == (0.75, 0.5)
    assert np.isnan(token_table(tokens[:1], first[:1])[0])


def test_loads_and_drops_by_position():
    routes = np.zeros((1, 16, 1), int)
    routes[0, 8:12], routes[0, 12:] = 1, -1
    dropped = np.zeros(routes.shape, bool)
    dropped[0, 9:12] = True
    found = layer_figures(made(routes, dropped=dropped), np.zeros((1, 16), int))
    np.testing.assert_allclose(found["load"], [2 / 3, 1 / 3, 0, 0])
    assert found["load_entropy"] == pytest.approx(np.log(3) - 2 / 3 * np.log(2))
    assert found["largest_load_over_mean"] == pytest.approx(8 / 3) and found["dropped_share"] == pytest.approx(1 / 4)
    assert [(part["first"], part["share"]) for part in found["dropped_by_position"]][4:6] == [(8, 0.5), (10, 1.0)]


def test_domains_apart_and_alike():
    routes = np.array([[[0], [1]], [[2], [3]], [[2], [3]]])
    rows = {"tokens": np.zeros((3, 2), int), "segment_ids": np.ones((3, 2), int)}
    layer = made(routes)
    apart = figures([layer], rows, domains={"a": np.array([0]), "b": np.array([1, 2])})["layers"][0]
    assert apart["domain_distance"] == 1 and apart["domain_load"]["b"] == [0, 0, 0.5, 0.5]
    alike = figures([layer], rows, domains={"a": np.array([1]), "b": np.array([2])})["layers"][0]
    assert alike["domain_distance"] == 0
    assert "domain_distance" not in figures([layer], rows, domains={"a": np.array([0])})["layers"][0]


def test_super_experts_stand_out():
    peaks = np.ones((2, 200))
    peaks[1, 7], peaks[0, 3] = 100, 11
    layers = [None, *(made(np.zeros((1, 1, 1), int), peaks=own) for own in peaks)]
    found = super_experts(layers)
    assert [(place["layer"], place["expert"]) for place in found] == [(2, 7), (1, 3)]
    assert found[0]["peak_over_median"] == 100
    peaks[0, 3] = 9.9  # below a tenth of the largest
    layers = [made(np.zeros((1, 1, 1), int), peaks=own) for own in peaks]
    assert [place["expert"] for place in super_experts(layers)] == [7]


def test_the_first_choice_is_the_heaviest():
    routes, weights = np.array([[1, 2], [3, -1], [-1, -1]]), np.array([[0.2, 0.8], [0.1, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(first_choices(routes, weights), [2, 3, -1])


def test_text_shows_what_there_is():
    rows = {"tokens": np.zeros((2, 4), int), "segment_ids": np.ones((2, 4), int)}
    dropped = np.zeros((2, 4, 1), bool)
    dropped[:, 3] = True
    stability = [{"step": 5, "agreement": {0: 0.5}}]
    text = routing_text(figures([made(np.zeros((2, 4, 1), int), dropped=dropped)], rows, stability))
    assert "0.500 (5)" in text and "1 of 4" in text and "dropped" in text and "by domain" not in text
    plain = routing_text(figures([made(np.zeros((2, 4, 1), int))], rows))
    assert "dropped" not in plain and "same since" not in plain
    assert "no layer has experts" in routing_text(figures([None], rows))
