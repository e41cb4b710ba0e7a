"""Submodels within a budget from the command line, the largest or the best that a search finds."""

import json

import numpy as np
import pytest

import efficient_lm as elm
from efficient_lm.api import Model
from efficient_lm.errors import ConfigError
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.parameters import count_parameters
from efficient_lm.search import search, within
from efficient_lm.validation import validate

TOKENS = np.arange(24).reshape(1, 24) % 200


def size(path, **parts):
    model = elm.load(path)
    return count_parameters((model.submodel(parts) if parts else model).model.declarations)


@pytest.mark.slow
def test_the_largest_within_a_budget(run, nested, tmp_path):
    budget = size(nested, ffn=[0.5, 1])
    status, out, err = run("extract", f"checkpoint={nested}", f"output={tmp_path / 'a'}", f"budget.params={budget}")
    assert (status, err) == (0, "") and "M parameters →" in out
    assert size(tmp_path / "a") == budget
    made, inside = elm.load(tmp_path / "a"), elm.load(nested, submodel={"ffn": [0.5, 1]})
    np.testing.assert_array_equal(made.logits(TOKENS), inside.logits(TOKENS))


def test_layers_that_share_keys_keep_the_same_part_of_heads(nested, drawn, tmp_path):
    trained, mixer = elm.load(nested), {"kind": "attention", "heads": 2}
    blocks = {name: {"mixer": mixer | {"shares_keys": name == "shared"}} for name in ("own", "shared")}
    values = {"width": 16, "blocks": blocks, "layout": ["own", "shared"], "elastic": {"heads": [0.5, 1]}}
    spec = validate(ModelSpec, values | {"vocab_size": trained.config.model.vocab_size})
    definition = spec.build()
    model = Model(trained.config.model_copy(update={"model": spec}), drawn(definition), trained.tokenizer)
    made = within(model, {"params": count_parameters(definition.declarations) - 1})
    assert [layer.mixer.heads for layer in made.model.layers] == [1, 1]
    with pytest.raises(ConfigError, match="heads: layers take the keys and values of others"):
        search(model, "mix_n_match", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["mix_n_match", "dynamic_programming", "evolution"])
def test_the_best_that_is_found(run, nested, tmp_path, kind):
    budget = size(nested, ffn=[0.5, 1]) + 1
    keys = [f"checkpoint={nested}", f"output={tmp_path / 'a'}", f"search={kind}", "limit=2"]
    keys += ["search.generations=2"] if kind == "evolution" else []
    status, out, err = run("extract", *keys)
    assert status == 0, err
    assert "submodels scored" in out and [entry.name for entry in (tmp_path / "a").iterdir()] == ["search"]
    before = (tmp_path / "a" / "search" / "scored.jsonl").read_text()
    status, _, err = run("extract", *keys, f"budget.params={budget}")
    assert status == 0, err
    assert (tmp_path / "a" / "search" / "scored.jsonl").read_text().startswith(before)
    found = json.loads((tmp_path / "a" / "search" / "pareto.json").read_text())
    (chosen,) = (row for row in found["submodels"] if row["chosen"])
    fitting = [row["loss"] for row in found["submodels"] if row["params"] <= budget]
    assert chosen["loss"] == min(fitting) and chosen["params"] == size(tmp_path / "a") <= budget
    assert sum(row["uniform"] for row in found["submodels"]) == 4


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["budget.params=1000"], "budget.params: 1,000, but no submodel has less than"),
        (
            ["budget.cache_bytes=10", "search=mix_n_match"],
            "budget.cache_bytes: 10, but no submodel has less than 8,712",
        ),
        (["budget.parms=1000"], "budget.parms: unknown key; did you mean 'params'"),
        (["budget.length=8"], "budget: say what a submodel may have at most"),
        (["budget.params=1e6", "ffn=0.5"], "ffn: a budget or a search says what stays"),
        (["search=annealing"], "search"),
        (["search=mix_n_match", "search.cost=money"], "search.cost"),
        (["search=evolution", "search.survivors=[4,2]"], "survivors descend from offspring=16 or less to 1; got"),
    ],
)
def test_faults_write_nothing(run, nested, tmp_path, keys, said):
    status, _, err = run("extract", f"checkpoint={nested}", f"output={tmp_path / 'new'}", *keys)
    assert status == 2 and said in err and not (tmp_path / "new").exists()
