"""The verb evaluate: tables, JSON, faults."""

import builtins
import json
import sys

import jax
import pytest

from efficient_lm.api import Model
from efficient_lm.config import load_run_config
from efficient_lm.training.setup import with_vocabulary


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run directory of a tiny model with fresh parameters."""
    options = ["tokenizer=bytes", "model.width=16", "model.repeats=1", "mixer.heads=2", "train.sequence_length=32"]
    config = load_run_config([*options, "run.name=tiny"])
    tokenizer = config.tokenizer.build()
    config = with_vocabulary(config, tokenizer)
    model = Model(config, config.model.build().init(jax.random.key(0)), tokenizer)
    return model.save(tmp_path_factory.mktemp("runs") / "tiny")


def test_table_and_json(checkpoint, run, tmp_path):
    (tmp_path / "note.txt").write_text("the people of a union " * 10)
    output = tmp_path / "scores.json"
    keys = [f"text={tmp_path / 'note.txt'}", "stride=8", "begin=none", "limit=9", f"output={output}"]
    status, out, err = run("evaluate", f"checkpoint={checkpoint}", *keys)
    assert (status, err) == (0, "")
    kept = json.loads(output.read_text())
    scores = kept["text"]
    assert kept["checkpoint"] == str(checkpoint) and kept["step"] == 0 and kept["tasks"] is None
    assert (scores["windows"], scores["tokens"]) == (9, 31 + 8 * 8) and scores["stride"] == 8
    assert scores["sequence_length"] == 32 and scores["begin"] == "none" and scores["limit"] == 9
    assert " ".join(out.split()).count(scores["scored"]) == 1
    assert f"bits per byte  {scores['bits_per_byte']:.4f}" in out and "16 to 31" in out and f"kept in {output}" in out
    assert sum(row["tokens"] for row in scores["loss_by_context"]) == scores["tokens"]


def test_tasks_alone_and_beside_text(checkpoint, run, tmp_path, monkeypatch):
    from efficient_lm.evaluation import lm_eval as adapter

    asked = []

    def run_tasks(model, tasks, **options):
        asked.append((tasks, options))
        metrics = {"acc": {"value": 0.25, "stderr": 0.125}, "exact_match,strict": {"value": 1.0, "stderr": None}}
        return {"mine": {"metrics": metrics, "examples": 4, "fewshot": 2, "version": 1}}

    monkeypatch.setattr(adapter, "run_tasks", run_tasks)
    output = tmp_path / "scores.json"
    keys = [f"checkpoint={checkpoint}", "tasks=mine", "fewshot=2", "limit=4", f"output={output}"]
    status, out, err = run("evaluate", *keys)
    assert (status, err) == (0, "") and json.loads(output.read_text())["text"] is None
    assert "mine  acc                 0.2500  ± 0.1250         4      2" in out and "bits per byte" not in out
    assert asked == [(("mine",), {"fewshot": 2, "limit": 4, "sequence_length": None, "batch_size": None})]
    (tmp_path / "note.txt").write_text("the people")
    status, out, _ = run("evaluate", *keys, f"text={tmp_path / 'note.txt'}")
    kept = json.loads(output.read_text())
    assert status == 0 and "bits per byte" in out and kept["text"]["windows"] == 1 and kept["tasks"]["mine"]


@pytest.mark.parametrize(
    ("keys", "status", "said"),
    [
        (["sequence_length=8", "stride=9"], 2, "stride: 9 would leave out text"),
        (["stride=33"], 2, "stride: 33 would leave out text between windows of sequence_length=32; at most 32"),
        (["begin=documents"], 2, "begin: "),
        (["limit=0"], 2, "limit: expected at least 1; got 0"),
        (["fewshot=1"], 2, "fewshot: examples are for tasks, and none is given"),
        (["output=missing/scores.json"], 2, "output: there is no folder 'missing'"),
        (["output=."], 2, "output: '.' is a folder"),
        (["text=missing.txt"], 3, "missing.txt"),
    ],
)
def test_faults(checkpoint, run, tmp_path, monkeypatch, keys, status, said):
    monkeypatch.chdir(tmp_path)
    found, _, err = run("evaluate", f"checkpoint={checkpoint}", *keys)
    assert found == status and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_without_lm_eval_the_extra_is_named(checkpoint, run, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "lm_eval":
            raise ImportError("No module named 'lm_eval'")
        return real(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "efficient_lm.evaluation.lm_eval", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    status, _, err = run("evaluate", f"checkpoint={checkpoint}", "tasks=arc_easy")
    assert status == 2 and "lm-eval is not installed" in err and "efficient-lm[lm_eval]" in err


def test_diagnostics_have_a_row_per_layer(checkpoint, run, tmp_path):
    output = tmp_path / "scores.json"
    status, out, err = run("evaluate", f"checkpoint={checkpoint}", "limit=1", "diagnostics=true", f"output={output}")
    assert (status, err) == (0, "")
    (layer,) = json.loads(output.read_text())["diagnostics"]
    assert layer["mixer"] == "attention" and len(layer["attention_entropy"]) == 2
    mean = sum(layer["attention_entropy"]) / 2
    assert "entropy, nats" in out and out.rstrip().splitlines()[-2].split()[-2:] == ["attention", f"{mean:.3f}"]
    status, _, err = run("evaluate", f"checkpoint={checkpoint}", "text=a.txt", "diagnostics=true")
    assert status == 2 and "use data=files instead of text" in err
