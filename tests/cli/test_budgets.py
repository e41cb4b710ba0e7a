"""Submodels within a budget from the command line, the largest or the best that a search finds."""

import json

import numpy as np
import pytest

import efficient_lm as elm
from efficient_lm.cli import main as cli
from efficient_lm.models.parameters import count_parameters

MODEL = ["model.width=16", "model.repeats=2", "mixer.heads=2", "ffn.hidden=32", "model.elastic={ffn: [0.25,0.5,1]}"]
TRAIN = ["tokenizer=bytes", "train.steps=2", "train.batch_size=2", "train.sequence_length=32", "data=files"]
TOKENS = np.arange(24).reshape(1, 24) % 200


@pytest.fixture(autouse=True)
def own_process_settings(monkeypatch):
    """What the command line sets for its process is none of the other tests' business."""
    monkeypatch.setattr(cli, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(cli, "configure_logging", lambda: None)


def run(capsys, *arguments):
    status = cli.main([*map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    root = tmp_path_factory.mktemp("budgets")
    lines = [json.dumps({"text": f"{number} and {number * number} are numbers"}) + "\n" for number in range(40)]
    (root / "text.jsonl").write_text("".join(lines))
    folder = root / "nested"
    keys = [f"data.source.paths={root / 'text.jsonl'}", "data.holdout_every=4", f"run.dir={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "keep_compiled_programs", lambda: None)
        assert cli.main(["train", *MODEL, *TRAIN, *keys, "nesting=sample"]) == 0
    return folder


def size(path, **parts):
    model = elm.load(path)
    return count_parameters((model.submodel(parts) if parts else model).model.declarations)


def test_the_largest_within_a_budget(capsys, nested, tmp_path):
    budget = size(nested, ffn=[0.5, 1])
    status, out, err = run(
        capsys, "extract", f"checkpoint={nested}", f"output={tmp_path / 'a'}", f"budget.params={budget}"
    )
    assert (status, err) == (0, "") and "M parameters →" in out
    assert size(tmp_path / "a") == budget
    made, inside = elm.load(tmp_path / "a"), elm.load(nested, submodel={"ffn": [0.5, 1]})
    np.testing.assert_array_equal(made.logits(TOKENS), inside.logits(TOKENS))


@pytest.mark.parametrize("search", ["mix_n_match", "dynamic_programming", "evolution"])
def test_the_best_that_is_found(capsys, nested, tmp_path, search):
    budget = size(nested, ffn=[0.5, 1]) + 1
    keys = [f"checkpoint={nested}", f"output={tmp_path / 'a'}", f"search={search}", "limit=2"]
    keys += ["search.generations=2"] if search == "evolution" else []
    status, out, err = run(capsys, "extract", *keys)
    assert status == 0, err
    assert "submodels scored" in out and [entry.name for entry in (tmp_path / "a").iterdir()] == ["search"]
    before = (tmp_path / "a" / "search" / "scored.jsonl").read_text()
    status, _, err = run(capsys, "extract", *keys, f"budget.params={budget}")
    assert status == 0, err
    assert (tmp_path / "a" / "search" / "scored.jsonl").read_text().startswith(before)
    found = json.loads((tmp_path / "a" / "search" / "pareto.json").read_text())
    (chosen,) = (row for row in found["submodels"] if row["chosen"])
    fitting = [row["loss"] for row in found["submodels"] if row["params"] <= budget]
    assert chosen["loss"] == min(fitting) and chosen["params"] == size(tmp_path / "a") <= budget
    assert sum(row["uniform"] for row in found["submodels"]) == 3


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
    ],
)
def test_faults_write_nothing(capsys, nested, tmp_path, keys, said):
    status, _, err = run(capsys, "extract", f"checkpoint={nested}", f"output={tmp_path / 'new'}", *keys)
    assert status == 2 and said in err and not (tmp_path / "new").exists()
