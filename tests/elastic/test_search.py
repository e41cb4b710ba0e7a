"""Searches for submodels: what they score, that scores are those of the models, and what they find."""

import csv
import itertools
import json
import re

import jax
import numpy as np
import pytest

from efficient_lm.elastic.budget import Meter, fits
from efficient_lm.elastic.choices import choose
from efficient_lm.elastic.search.base import Space
from efficient_lm.elastic.search.dynamic_programming import DynamicProgrammingSpec, knapsack
from efficient_lm.elastic.search.evolution import EvolutionSpec, mutated, start
from efficient_lm.elastic.search.mix_n_match import mixes
from efficient_lm.elastic.search.report import frontier, write_report
from efficient_lm.elastic.search.scoring import SCORED, Scorer
from efficient_lm.elastic.submodels import submodel_parameters, submodel_spec
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.validation import validate

ELASTIC = {"ffn": [0.25, 0.5, 1], "heads": [0.5, 1]}
LENGTH = 12


def model_of(elastic=ELASTIC, repeats=3, **changes):
    block = {"mixer": {"kind": "attention", "heads": 2}, "ffn": {"kind": "swiglu", "hidden": 16}}
    values = {"width": 16, "vocab_size": 24, "blocks": {"layer": block}, "layout": ["layer"], "repeats": repeats}
    return validate(ModelSpec, values | {"elastic": elastic, "init_std": 0.3} | changes).build()


def rows(count=3, seed=0):
    drawn = np.random.default_rng(seed).integers(0, 24, (count, LENGTH + 1)).astype(np.int32)
    ones = np.ones((count, LENGTH), np.int32)
    batch = {"tokens": drawn[:, :-1], "targets": drawn[:, 1:], "segment_ids": ones, "weights": ones.astype(np.float32)}
    batch["weights"] = batch["weights"] * (np.arange(LENGTH) > 2)
    return batch | {"positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (count, LENGTH))}


def space_of(model):
    return Space.of(model, Meter(LENGTH))


class Given:
    """Scores by a function, which a search cannot tell from those of a model."""

    def __init__(self, function, pieces=4):
        self.function, self.pieces, self.seen = function, pieces, {}

    def __call__(self, levels, pieces=None):
        value = self.function(levels)
        if pieces is None or pieces >= self.pieces:
            self.seen[tuple(levels)] = value
        return value


def expected_scores(model, params, space, levels, batch, fitness):
    choice = choose(model, space.parts(levels))
    small = submodel_spec(model, choice).build()
    mine = submodel_parameters(model, small, params, choice.layers)
    part, whole = (jax.nn.log_softmax(m.logits(p, batch["tokens"])) for m, p in ((small, mine), (model, params)))
    if fitness == "kl":
        found = (np.exp(whole) * (whole - part)).sum(-1)
    else:
        found = -np.take_along_axis(np.asarray(part), batch["targets"][..., None], -1)[..., 0]
    return float((found * batch["weights"]).sum() / batch["weights"].sum())


@pytest.mark.slow
@pytest.mark.parametrize("fitness", ["loss", "kl"])
def test_scores_are_those_of_the_models_that_are_made_in_one_program(tmp_path, fitness, drawn):
    model, batch = model_of(), rows()
    params, space = drawn(model), space_of(model)
    score = Scorer(space, params, batch, fitness, tmp_path)
    for levels in ((0, 1, 2), (2, 0, 1), (2, 2, 2)):
        expected = expected_scores(model, params, space, levels, batch, fitness)
        assert score(levels) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert score._program._cache_size() == 1


@pytest.mark.slow
def test_layers_with_fewer_experts_are_scored(tmp_path, drawn):
    ffn = {"kind": "moe", "experts": 4, "top_k": 2, "expert": {"kind": "swiglu", "hidden": 8}}
    block = {"mixer": {"kind": "attention", "heads": 2}, "ffn": ffn}
    model, batch = model_of({"experts": [0.5, 1], "heads": [0.5, 1]}, repeats=2, blocks={"layer": block}), rows()
    params, space = drawn(model), space_of(model)
    score = Scorer(space, params, batch, "loss", tmp_path)
    for levels in ((0, 1), (1, 1)):
        expected = expected_scores(model, params, space, levels, batch, "loss")
        assert score(levels) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_layers_that_kept_their_numbers_have_their_own_levels(tmp_path, drawn):
    model, batch = model_of(numbering={"layers": [1, 3, 4], "of": 6}), rows()
    params, space = drawn(model), space_of(model)
    score = Scorer(space, params, batch, "loss", tmp_path)
    expected = expected_scores(model, params, space, (0, 2, 1), batch, "loss")
    assert score((0, 2, 1)) == pytest.approx(expected, rel=1e-5)


def test_a_search_goes_on_where_it_stopped(tmp_path, monkeypatch, drawn):
    monkeypatch.setattr("efficient_lm.evaluation.rows.TOKENS", LENGTH)
    model, batch = model_of(repeats=2), rows()
    params, space = drawn(model), space_of(model)
    first = Scorer(space, params, batch, "loss", tmp_path)
    assert first.pieces == 3
    found = {levels: first(levels) for levels in ((0, 0), (1, 2))}
    part = first((2, 1), 1)
    first.close()
    path = tmp_path / SCORED
    path.write_text(path.read_text() + '{"levels": [2,')
    again = Scorer(space, params, batch, "loss", tmp_path)
    assert again.results == found and again((2, 1), 1) == part and again((1, 2)) == found[1, 2]
    assert again.computed == 0
    assert again((2, 1)) != part and again.computed == 1
    again.close()
    with pytest.raises(CheckpointError, match="scores of another model, other parts, other rows or another fitness"):
        Scorer(space, params, rows(seed=1), "loss", tmp_path)


def test_scores_of_parts_along_another_axis_are_not_taken(tmp_path, drawn):
    ffn, heads = (space_of(model_of({axis: [0.5, 1]}, repeats=2)) for axis in ("ffn", "heads"))
    assert [each.name for each in ffn.nested] == [each.name for each in heads.nested]
    params = drawn(ffn.model)
    Scorer(ffn, params, rows(), "loss", tmp_path).close()
    with pytest.raises(CheckpointError, match="scores of another model, other parts"):
        Scorer(heads, params, rows(), "loss", tmp_path)


def test_mixes_lie_between_neighbours_and_grow_with_depth():
    space = space_of(model_of({"ffn": [0.25, 0.5, 1]}))
    found = list(mixes(space))
    assert found == [(0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1), (1, 1, 2), (1, 2, 2), (2, 2, 2)]
    sizes = [space.costs.of(levels)["params"] for levels in found]
    assert sizes == sorted(sizes)
    assert space.parts((0, 1, 2)) == {"ffn": [0.25, 0.5, 1]}


def test_where_each_goes_with_each_only_growing_parts_are_mixed():
    space = space_of(model_of({"ffn": [0.5, 1], "heads": [0.5, 1], "combine": "apart"}))
    assert len(space.nested) == 4 and len(space.chain) == 3
    assert space.chain[0] == 0 and space.chain[-1] == 3


def test_models_without_parts_are_refused():
    with pytest.raises(ConfigError, match="the model was not trained to have smaller ones inside"):
        space_of(model_of(None))
    with pytest.raises(ConfigError, match="the model is elastic along layers"):
        space_of(model_of({"layers": [1 / 3, 1]}))


def beaten(point, points):
    return any(all(np.array(other) <= point) and other != point for other in points)


def test_the_knapsack_finds_what_trying_all_finds():
    rng = np.random.default_rng(3)
    harm, costs = rng.normal(size=(3, 5)), rng.integers(1, 9, (3, 5, 2)).astype(float)
    every = list(itertools.product(range(3), repeat=5))
    place = np.arange(5)
    total = {levels: (harm[levels, place].sum(), *costs[levels, place].sum(0)) for levels in every}
    for room in ([20.0, 24.0], [24.0, np.inf]):
        best = min((levels for levels in every if (np.array(total[levels][1:]) <= room).all()), key=total.get)
        found = knapsack(costs, harm, np.array(room))
        assert found[-1] == best
        assert all(np.all(np.array(total[levels][1:]) <= room) for levels in found)
    alone = knapsack(costs[..., :1], harm, np.array([np.inf]))
    front = [total[levels][:2] for levels in alone]
    assert front == sorted(front, key=lambda point: (-point[0], point[1]))
    points = [found[:2] for found in total.values()]
    assert {point for point in points if not beaten(point, points)} == set(front)


WORTH = np.array([1.0, 5.0, 0.1, 3.0])


def missed(levels):
    """What layers are missed adds up: the second most, the third hardly."""
    return float(sum(worth * (2 - level) for worth, level in zip(WORTH, levels, strict=True)))


@pytest.mark.parametrize("search", [DynamicProgrammingSpec(), EvolutionSpec(generations=12, survivors=(8, 1))])
def test_they_find_the_best_within_a_budget(search):
    space = space_of(model_of({"ffn": [0.25, 0.5, 1]}, repeats=4))
    flops = space.costs.of((0, 2, 1, 0))["flops_per_token"]
    for limits in ({"params": space.costs.of((1, 1, 1, 1))["params"]}, {"flops_per_token": flops, "params": 9e9}):
        every = itertools.product(range(3), repeat=4)
        best = min(missed(levels) for levels in every if fits(space.costs.of(levels), limits))
        score = Given(missed)
        search.run(space, score, limits, "params")
        assert min(value for levels, value in score.seen.items() if fits(space.costs.of(levels), limits)) == best


def test_evolution_keeps_to_its_budget_and_repeats_itself():
    space = space_of(model_of({"ffn": [0.25, 0.5, 1]}, repeats=4))
    limits = {"params": space.costs.of((1, 1, 1, 1))["params"]}
    rng = np.random.default_rng(0)
    children = {mutated(space, (1, 1, 1, 1), limits, rng) for _ in range(40)}
    assert len(children) > 4 and all(fits(space.costs.of(levels), limits) for levels in children)
    assert start(space, limits) == (1, 1, 1, 1)
    found = []
    for _ in range(2):
        score = Given(missed)
        EvolutionSpec(generations=2, points=2).run(space, score, {}, "params")
        found.append(list(score.seen))
    assert found[0] == found[1]
    sizes = [space.costs.of(levels)["params"] for levels in found[0]]
    assert max(sizes) > 1.1 * min(sizes)


def test_reports(tmp_path):
    space = space_of(model_of({"ffn": [0.25, 0.5, 1]}))
    scores = {(0, 0, 0): 3.0, (0, 0, 1): 2.5, (0, 1, 1): 2.6, (1, 1, 1): float("nan"), (2, 2, 2): 2.0}
    rows = frontier(space, scores, "params")
    assert [row.best for row in rows] == [True, True, False, False, True]
    assert [row.uniform for row in rows] == [True, False, False, True, True]
    write_report(tmp_path, rows, "loss", "params", rows[1], {"params": 5000.0})
    kept = json.loads((tmp_path / "pareto.json").read_text())
    assert [row["loss"] for row in kept["submodels"]] == [3.0, 2.5, 2.6, None, 2.0]
    assert kept["submodels"][1]["chosen"] and kept["submodels"][1]["parts"] == {"ffn": [0.25, 0.25, 0.5]}
    table = list(csv.DictReader((tmp_path / "pareto.csv").open()))
    assert table[1]["submodel"] == "ffn=[0.25,0.25,0.5]" and float(table[0]["params"]) == rows[0].costs["params"]
    page = (tmp_path / "pareto.html").read_text()
    assert "ffn=[0.25,0.25,0.5]" in page and "%DATA%" not in page and "NaN" not in page
    assert not re.findall(r"(?:src|href)\s*=|https?://(?!www\.w3\.org/2000/svg)", page)
    assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"
