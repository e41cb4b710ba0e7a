"""Models that were not trained to be smaller, cut from the command line and from Python."""

import json

import numpy as np
import pytest

import efficient_lm as elm
from efficient_lm.elastic.search.mix_n_match import MixNMatchSpec
from efficient_lm.errors import ConfigError
from efficient_lm.models.parameters import count_parameters
from efficient_lm.search import search, within

TOKENS = np.arange(24).reshape(1, 24) % 200


def down(model):
    return np.asarray(model.params["stack"]["segment_0"]["layer_0"]["ffn"]["inner"]["down"]["weight"])


@pytest.mark.slow
def test_the_most_active_units_are_extracted(run, plain, numbers, tmp_path):
    model, found = elm.load(plain), {}
    for name, keys in {"left_out": [], "active": ["order=activation"], "first": ["order=none"]}.items():
        arguments = ["extract", f"checkpoint={plain}", f"output={tmp_path / name}", "ffn=0.5", "limit=4", *keys]
        status, _, err = run(*arguments)
        assert status == 0, err
        found[name] = down(elm.load(tmp_path / name))
    np.testing.assert_array_equal(found["first"], down(model)[:, :16])
    np.testing.assert_array_equal(found["left_out"], found["active"])
    assert not np.array_equal(found["active"], found["first"])
    np.testing.assert_array_equal(down(model.extract(ffn=0.5, rows=4)), found["active"])
    heavy = down(model.extract(ffn=0.5, order="weight", text=str(numbers)))
    rows = {tuple(row) for row in down(model)[0]}
    assert {tuple(row) for row in heavy[0]} < rows and heavy.shape == found["active"].shape
    assert model.extract(layers=0.5, rows=4).config.model.numbering.layers in ((0,), (1,))


@pytest.mark.slow
def test_parts_are_chosen_of_what_is_worth_most(run, plain, tmp_path):
    """Within a budget, of a model that was trained for none; with a search the same units are in question."""
    model, budget = elm.load(plain), count_parameters(elm.load(plain).submodel({"ffn": 0.5}).model.declarations)
    keys = [f"checkpoint={plain}", "limit=4", f"budget.params={budget}", "order=weight"]
    searched = ["search=mix_n_match", "elastic={ffn: [0.25,0.5,0.75,1], heads: [0.5,1], combine: apart}"]
    for name, more in {"largest": ["elastic.ffn=[0.5,1]"], "matformer": [], "best": searched}.items():
        status, _, err = run("extract", f"output={tmp_path / name}", *keys, *more)
        assert status == 0, err
        made = elm.load(tmp_path / name)
        assert made.config.model.elastic is None and count_parameters(made.model.declarations) <= budget
    expected = model.extract(ffn=0.5, order="weight")
    for name in ("largest", "matformer"):
        np.testing.assert_array_equal(elm.load(tmp_path / name).logits(TOKENS), expected.logits(TOKENS))
    found = json.loads((tmp_path / "best" / "search" / "pareto.json").read_text())["submodels"]
    (chosen,) = (row for row in found if row["chosen"])
    assert set(chosen["parts"]) == {"ffn", "heads"}
    ordered = model.extract(ffn=1, heads=1, order="weight").submodel(chosen["parts"])
    np.testing.assert_array_equal(elm.load(tmp_path / "best").logits(TOKENS), ordered.logits(TOKENS))
    status, out, err = run("generate", f"checkpoint={tmp_path / 'best'}", "prompt=7", "max_new_tokens=2")
    assert (status, err) == (0, "") and out


@pytest.mark.slow
def test_a_nested_model_is_chosen_from_along_other_axes_too(nested, tmp_path):
    model = elm.load(nested)
    found = search(model, "mix_n_match", tmp_path, {"params": 1e6}, rows=2, elastic={"heads": [0.5, 1]})
    assert {axis for row in found.rows for axis in row.parts} == {"ffn", "heads"}
    np.testing.assert_allclose(found.model.logits(TOKENS), model.logits(TOKENS), atol=1e-4)
    with pytest.raises(ConfigError, match="elastic.ffn: the model is trained for 0.125, 0.25, 0.5, 1 of it"):
        search(model, "mix_n_match", tmp_path, elastic={"ffn": [0.5, 1]})
    with pytest.raises(ConfigError, match="search.fitness: goes with the name of a kind"):
        search(model, MixNMatchSpec(), tmp_path, fitness="kl")
    with pytest.raises(ConfigError, match="order: the model is trained so that the first of ffn are the ones to keep"):
        within(model, {"params": 1e6}, order="weight")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["budget.params=1e4"], "say among which parts to choose, elastic.ffn=[0.25,0.5,0.75,1]; order="),
        (["search=mix_n_match"], "elastic: the model was not trained to have smaller ones inside"),
        (["elastic.ffn=[0.5,1]"], "extract: say what stays"),
        (["elastic.ffn=[0.5,1]", "ffn=0.5"], "elastic: a budget or a search chooses among granularities"),
        (["budget.params=1e4", "elastic.ffn=[0.3,1]"], "elastic.ffn of layer 0: 0.3 of 32 is no whole number; nearest"),
        (["budget.params=1e4", "elastic.fnn=[0.5,1]"], "elastic.fnn: unknown key; did you mean 'ffn'"),
        (["budget.params=1e4", "elastic.state=[0.5,1]"], "elastic.state: no layer of the model is elastic along it"),
        (["budget.params=1e4", "elastic.layers=[0.5,1]"], "elastic.layers: what is chosen are parts of layers"),
        (["budget.params=10", "order=weight"], "budget.params: 10, but no submodel has less than"),
        (["budget.params=1e4", "order=none", "text=missing.txt"], "text: nothing is measured"),
        (["ffn=0.5", "order=activations"], "order: "),
        (["experts=[0]", "order=weight"], "order: it says which units a part of an axis keeps"),
        (["ffn=0.5", "order=none", "text=missing.txt"], "text: nothing is measured; it is for a number of experts"),
        (["ffn=0.5", "text=missing.txt"], "missing.txt"),
        (["ffn=0.5", "uneven=true"], "uneven: nothing is measured"),
        (["ffn=0.5", "by=weight"], "by: nothing is measured; it is for a number of experts"),
        (["experts=0.5", "top_k=1"], "top_k: it goes with experts that are counted or named"),
        (["budget.params=1e4", "order=none", "sequence_length=8"], "sequence_length: nothing is measured"),
    ],
)
def test_faults_write_nothing(run, plain, tmp_path, keys, said):
    status, _, err = run("extract", f"checkpoint={plain}", f"output={tmp_path / 'new'}", *keys)
    assert status != 0 and said in err and not (tmp_path / "new").exists()
