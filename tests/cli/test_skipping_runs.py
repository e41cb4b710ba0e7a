"""Policies from the command line and from Python: what they change, what they say they computed, faults."""

import json
import logging

import jax
import pytest

from efficient_lm.api import Model
from efficient_lm.config import load_run_config
from efficient_lm.errors import ConfigError
from efficient_lm.evaluation.requests import Request, RequestScorer
from efficient_lm.training.setup import with_vocabulary


def made(*options):
    options = ["model.width=16", "model.repeats=4", "mixer.heads=2", "model.init_std=0.4", "run.name=tiny", *options]
    config = load_run_config(options)
    tokenizer = config.tokenizer.build()
    config = with_vocabulary(config, tokenizer)
    return Model(config, config.model.build().init(jax.random.key(0)), tokenizer)


@pytest.fixture(scope="module")
def model():
    return made("tokenizer=bytes", "train.sequence_length=32", "model.exits={every: 1}", "depth=layer_drop")


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    return model.save(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.mark.slow
def test_generate_says_what_it_computed(checkpoint, run, caplog):
    options = [f"checkpoint={checkpoint}", "prompt=In war", "max_new_tokens=6", "stop_at_end=false"]
    with caplog.at_level(logging.INFO):
        assert run("generate", *options, "skipping=uniform", "skipping.layers=2")[0] == 0
        skipped = [record.message for record in caplog.records if "tokens ran" in record.message]
        assert run("generate", *options)[0] == 0
    assert skipped[0].startswith("5 tokens ran 2.00 mixers and 2.00 ffns of 4 layers on average: ")
    assert sum("tokens ran" in record.message for record in caplog.records) == 1


def test_evaluate_scores_under_a_policy(checkpoint, run, tmp_path):
    (tmp_path / "note.txt").write_text("the people of a union " * 10)
    keys = [
        f"checkpoint={checkpoint}",
        f"text={tmp_path / 'note.txt'}",
        "limit=4",
        f"output={tmp_path / 'scores.json'}",
    ]
    status, out, err = run("evaluate", *keys, "skipping=uniform", "skipping.layers=3")
    assert (status, err) == (0, "")
    kept = json.loads((tmp_path / "scores.json").read_text())
    assert kept["skipping"]["kind"] == "uniform" and kept["skipping"]["layers"] == 3
    found = kept["text"]["computed"]
    assert found["mixer_shares"] == [1, 0, 1, 1] and found["ffns_per_token"] == 3 and 0.5 < found["flops_share"] < 1
    assert "3.00 mixers and 3.00 ffns of 4 layers" in out
    assert run("evaluate", *keys)[0] == 0
    whole = json.loads((tmp_path / "scores.json").read_text())
    assert "computed" not in whole["text"] and "skipping" not in whole
    assert whole["text"]["bits_per_byte"] != kept["text"]["bits_per_byte"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["skipping=unifrom"], "skipping=unifrom: no such config; did you mean 'uniform'?"),
        (["skipping=uniform"], "skipping.layers: a value is needed"),
        (["skipping=uniform", "skipping.layers=9"], "skipping.layers: 9, but the model has 4 layers; nearest"),
        (["skipping=confidence", "skipping.threshold=1.5"], "skipping.threshold: expected at most 1"),
        (["skipping=ponder"], "skipping.kind: 'ponder' needs probabilities to leave"),
    ],
)  # fmt: skip
def test_faults_name_the_key(checkpoint, run, options, words):
    status, _, err = run("generate", f"checkpoint={checkpoint}", "prompt=In", *options)
    assert status == 2 and words in err


def test_a_model_skips(model):
    few = model.skip("uniform", layers=2)
    assert few.params is model.params and few.skip(None).skipping is None
    assert (
        len(few.generate("In war", max_new_tokens=4, temperature=0)) >= 0 and few.decoder.report.mixers.tolist()[1] == 0
    )
    tokens = model.tokenizer.encode("the people")[None]
    assert float(abs(few.logits(tokens) - model.logits(tokens)).max()) > 0
    with pytest.raises(ConfigError, match="unknown skipping kind 'patient'; did you mean 'patience'"):
        model.skip("patient")


def test_tasks_and_requests_are_scored_under_the_policy(model):
    request = Request(model.tokenizer.encode("the people").tolist(), model.tokenizer.encode(" of").tolist())
    few = model.skip("uniform", layers=2)
    answers = []
    for asked in (model, few):
        scorer = RequestScorer(asked.model, asked.params, asked.dtype, 32, 512, 8, asked.skipping)
        answers.append(next(scorer.answers([request]))[1].log_probability)
    ids = model.tokenizer.encode("the people of")[None]
    logs = jax.nn.log_softmax(few.logits(ids)[0, -4:-1])
    assert answers[1] == pytest.approx(float(sum(logs[i, ids[0, i - 3]] for i in range(3))), abs=1e-4)
    assert answers[0] != answers[1]


def test_answers_to_a_task_say_what_they_computed():
    model = made("data=parity", "data.validation_examples=4", "data.length=16")
    found = model.skip("uniform", layers=1).evaluate()["lengths"][0]["computed"]
    assert found["mixers_per_token"] == 1 and found["mixer_shares"] == [1, 0, 0, 0]
