"""Mixture of depths as it is typed: both ways of choosing tokens, the rank of attention, rules around dense layers."""

import json

import jax
import numpy as np
import pytest

import efficient_lm as elm
from efficient_lm.api import Model
from efficient_lm.config import load_run_config
from efficient_lm.training.setup import with_vocabulary


def saved(folder, *options):
    small = ["tokenizer=bytes", "model.width=16", "model.repeats=2", "mixer.heads=2", "train.sequence_length=32"]
    config = load_run_config([*small, "run.name=tiny", *options])
    tokenizer = config.tokenizer.build()
    config = with_vocabulary(config, tokenizer)
    return Model(config, jax.jit(config.model.build().init)(jax.random.key(0)), tokenizer).save(folder)


@pytest.mark.slow
def test_both_selections_and_ranks(run, tmp_path):
    checkpoint, output = saved(tmp_path / "tiny", "depth=mixture_of_depths"), tmp_path / "scores.json"
    keys = ["selection=both", "attention_rank=true", "limit=3", f"output={output}"]
    status, out, err = run("evaluate", f"checkpoint={checkpoint}", *keys)
    assert (status, err) == (0, "")
    kept = json.loads(output.read_text())
    (row,) = kept["causal"]["layers"]
    assert row["layer"] == 1 and 0 <= row["depth_accuracy"] <= 1
    assert kept["text"]["tokens"] == kept["causal"]["text"]["tokens"] and out.count("bits per byte") == 2
    assert f"mean{row['depth_accuracy']:>21.4f}" in out
    ranks = kept["attention_rank"]
    assert [len(layer["ranks"]) for layer in ranks] == [2, 2] and all(1 <= layer["rank"] <= 32 for layer in ranks)
    status, _, err = run("evaluate", f"checkpoint={checkpoint}", "text=a.txt", "selection=both")
    assert status == 2 and "use data=files instead" in err


def test_without_a_rule_there_is_no_selection(run, tmp_path):
    status, _, err = run("evaluate", f"checkpoint={saved(tmp_path / 'tiny')}", "selection=causal", "limit=1")
    assert status == 2 and "selection: no block of the model has a depth rule that chooses tokens" in err


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A run whose layers rows may pass by in training, which the rule takes the place of."""
    return saved(tmp_path_factory.mktemp("runs") / "dense", "model.repeats=4", "depth=layer_drop")


@pytest.mark.slow
def test_layers_of_low_rank_get_the_rule(dense, run, tmp_path):
    keys = ["method=mixture_of_depths", "method.rule.capacity=[0.5,0.25]", "limit=3"]
    output = tmp_path / "routed"
    status, out, err = run("upcycle", f"checkpoint={dense}", f"output={output}", *keys)
    assert (status, err) == (0, "")
    made = elm.load(output)
    chosen = [number for number, layer in enumerate(made.model.layers) if layer.depth.kind == "mixture_of_depths"]
    assert f"2 of 4 layers choose their tokens: {chosen[0]}, {chosen[1]}" in out and "selection=both" in out
    rules = [made.model.layers[number].depth for number in chosen]
    assert [(rule.capacity, rule.weight_offset) for rule in rules] == [(0.5, 1.0), (0.25, 1.0)]
    ranks = [layer["rank"] for layer in elm.load(dense).attention_rank(rows=3)]
    assert chosen == sorted(np.argsort(ranks)[:2].tolist())
    assert made.generate("In war", max_new_tokens=4, temperature=0, stop_at_end=False)
    assert made.decoder.report.tokens == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["method.layers=[1,4]"], "method.layers: there is no layer 4; valid: 0 to 3"),
        (["method.rule.capacity=1.5"], "method.rule.capacity: expected at most 1"),
        (["method.rule.capacity=[1,0.5,0.2]"], "method.rule: 'capacity' lists 3 values, but 2 layers use it"),
        (["method.rule.capcity=1"], "method.rule.capcity: unknown key; did you mean 'capacity'?"),
        (["method.rule.every=2"], "method.rule: 'every' is left out"),
        (["method.share=0"], "method.share: expected a number above 0"),
        (["method.experts=4"], "method.experts: unknown key"),
    ],
)
def test_faults_of_the_way_leave_nothing(dense, run, tmp_path, options, said):
    keys = [f"checkpoint={dense}", f"output={tmp_path / 'routed'}", "method=mixture_of_depths"]
    status, out, err = run("upcycle", *keys, *options)
    assert (status, out) == (2, "") and said in err and err.count("\n") <= 2 and not (tmp_path / "routed").exists()


def test_what_ranks_cannot_choose(run, tmp_path):
    for name, options, keys, said in (
        ("recurrent", ["mixer=gla"], [], "method.layers: no layer has attention whose rank could choose"),
        ("routed", ["depth=router_skip"], ["method.layers=[0]"], "layer 0 has the depth rule 'router_skip' already"),
    ):
        checkpoint = saved(tmp_path / name, *options)
        keys = [f"checkpoint={checkpoint}", f"output={tmp_path / 'made'}", "method=mixture_of_depths", *keys]
        status, _, err = run("upcycle", *keys)
        assert status == 2 and said in err
