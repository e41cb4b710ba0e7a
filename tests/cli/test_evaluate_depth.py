"""`evaluate` of a model with mixture of depths: both ways of choosing tokens, and the rank of attention."""

import json

import jax
import pytest

from efficient_lm.api import Model
from efficient_lm.cli import main as cli
from efficient_lm.config import load_run_config
from efficient_lm.training.setup import with_vocabulary


@pytest.fixture(autouse=True)
def _quietly(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "keep_compiled_programs", lambda: None)
    monkeypatch.setenv("EFFICIENT_LM_CACHE", str(tmp_path / "cache"))


def saved(folder, *options):
    small = ["tokenizer=bytes", "model.width=16", "model.repeats=2", "mixer.heads=2", "train.sequence_length=32"]
    config = load_run_config([*small, "run.name=tiny", *options])
    tokenizer = config.tokenizer.build()
    config = with_vocabulary(config, tokenizer)
    return Model(config, jax.jit(config.model.build().init)(jax.random.key(0)), tokenizer).save(folder)


def run(capsys, *arguments):
    status = cli.main(["evaluate", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_both_selections_and_ranks(capsys, tmp_path):
    checkpoint, output = saved(tmp_path / "tiny", "depth=mixture_of_depths"), tmp_path / "scores.json"
    keys = ["selection=both", "attention_rank=true", "limit=3", f"output={output}"]
    status, out, err = run(capsys, f"checkpoint={checkpoint}", *keys)
    assert (status, err) == (0, "")
    kept = json.loads(output.read_text())
    (row,) = kept["causal"]["layers"]
    assert row["layer"] == 1 and 0 <= row["depth_accuracy"] <= 1
    assert kept["text"]["tokens"] == kept["causal"]["text"]["tokens"] and out.count("bits per byte") == 2
    assert f"mean{row['depth_accuracy']:>21.4f}" in out
    ranks = kept["attention_rank"]
    assert [len(layer["ranks"]) for layer in ranks] == [2, 2] and all(1 <= layer["rank"] <= 32 for layer in ranks)
    status, _, err = run(capsys, f"checkpoint={checkpoint}", "text=a.txt", "selection=both")
    assert status == 2 and "use data=files instead" in err


def test_without_a_rule_there_is_no_selection(capsys, tmp_path):
    status, _, err = run(capsys, f"checkpoint={saved(tmp_path / 'tiny')}", "selection=causal", "limit=1")
    assert status == 2 and "selection: no block of the model has a depth rule that chooses tokens" in err
