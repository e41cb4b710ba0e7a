"""Elastic models from the command line: trained, used at a smaller size, extracted."""

import json

import numpy as np
import pytest

import efficient_lm as elm
from efficient_lm.cli.train import sizes as sizes_said
from efficient_lm.experts import upcycle

TOKENS = np.arange(24).reshape(1, 24) % 200


def test_every_size_is_validated(nested):
    summary = json.loads((nested / "summary.json").read_text())
    sizes = {name for name in summary if name.startswith("val_bits_per_byte")}
    assert sizes == {"val_bits_per_byte", *(f"val_bits_per_byte_{part}" for part in ("0.125", "0.25", "0.5"))}
    smallest, *_, whole = summary["sizes"]
    assert smallest["bits_per_byte"] == summary["val_bits_per_byte_0.125"] and smallest["parts"] == {"ffn": 0.125}
    assert whole["parameters"] == summary["parameters"] > smallest["parameters"]
    assert (nested / "plots" / "sizes.png").stat().st_size > 10_000
    assert "plots/sizes.png; efficient-lm extract" in sizes_said(summary)
    # Answers to a task have no bits per byte, and so no picture.
    rows = [row | {"bits_per_byte": None} for row in summary["sizes"]]
    said = sizes_said(summary | {"sizes": rows})
    assert "sizes.png" not in said
    assert said.endswith(f"\nefficient-lm extract checkpoint={nested} output={nested}-small ffn=0.125")
    whole, half = (elm.load(nested, submodel=part).evaluate(limit=2)["tokens"] for part in (1.0, 0.5))
    assert whole == half


@pytest.mark.slow
def test_it_is_used_and_extracted_at_a_smaller_size(run, nested, on_numbers, tmp_path):
    where = tmp_path / "half"
    status, out, err = run("extract", f"checkpoint={nested}", f"output={where}", "ffn=0.5")
    assert (status, err) == (0, "") and f"M parameters → {where}" in out
    half, inside = elm.load(where), elm.load(nested, submodel=0.5)
    np.testing.assert_array_equal(half.logits(TOKENS), inside.logits(TOKENS))
    assert half.config.model.blocks["layer"].ffn.hidden == 16
    assert half.config.model.elastic.ffn == (0.25, 0.5, 1.0) and half.config.nesting.kind == "none"
    np.testing.assert_array_equal(half.submodel(0.5).logits(TOKENS), elm.load(nested, submodel=0.25).logits(TOKENS))
    scores = [tmp_path / f"{name}.json" for name in ("inside", "half")]
    for source, keys, kept in ((nested, ["submodel=0.5"], scores[0]), (where, [], scores[1])):
        assert run("evaluate", f"checkpoint={source}", "limit=2", f"output={kept}", *keys)[0] == 0
    first, second = (json.loads(path.read_text())["text"]["bits_per_byte"] for path in scores)
    assert first == second
    status, out, _ = run("generate", f"checkpoint={nested}", "submodel.ffn=0.25", "prompt=A", "max_new_tokens=2")
    assert status == 0 and out.startswith("A")
    keys = [key for key in on_numbers if not key.startswith(("model.", "mixer.", "ffn."))]
    status, _, err = run("train", *keys, f"init_from={where}", f"run.dir={tmp_path / 'on'}", "nesting=sample")
    assert status == 0, err
    assert "val_bits_per_byte_0.25" in json.loads((tmp_path / "on" / "summary.json").read_text())


def test_layers_and_blocks(run, nested, tmp_path):
    for name, keys, hidden in (
        ("uneven", ["ffn=[0.25,1]"], [8, 32]),
        ("by_block", ["ffn.layer=0.5"], [16, 16]),
        ("shallow", ["layers=[1]"], [32]),
    ):
        status, _, err = run("extract", f"checkpoint={nested}", f"output={tmp_path / name}", *keys)
        assert (status, err) == (0, "")
        model = elm.load(tmp_path / name)
        assert [layer.ffn.hidden_size(16) for layer in model.model.layers] == hidden
        assert np.all(np.isfinite(model.logits(TOKENS)))
    assert elm.load(tmp_path / "shallow").config.model.numbering.layers == (1,)


def test_experts_that_divide_its_units_are_not_nested(nested, tmp_path):
    for method, axes in (({"method": "split", "by": "contiguous"}, None), ({"method": "copy"}, ["ffn"])):
        path = upcycle(elm.load(nested), experts=2, top_k=1, **method).save(tmp_path / method["method"])
        config = elm.load(path).config
        assert (config.model.elastic and [*config.model.elastic.axes]) == axes and config.nesting.kind == "none"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["ffn=0.3"], "ffn: the model is trained for 0.125, 0.25, 0.5, 1 of it, and not for 0.3; nearest: 0.25"),
        (["ffn=1.5"], "ffn: a part is above 0 and at most 1; got 1.5"),
        (["state=0.5"], "state: no layer of the model is elastic along it"),
        (["layers=[0,7]"], "layers: there is no layer 7; they are 0 to 1"),
        (["heads=0.3"], "heads of layer 0: 0.3 of 2 is no whole number; nearest: 0.5"),
        ([], "extract: say what stays"),
        (["fnn=0.5"], "fnn: unknown key; did you mean 'ffn'"),
    ],
)
def test_faults_write_nothing(run, nested, tmp_path, keys, said):
    status, _, err = run("extract", f"checkpoint={nested}", f"output={tmp_path / 'new'}", *keys)
    assert status == 2 and said in err and not (tmp_path / "new").exists()


def test_sizes_there_are_not(run, nested, on_numbers, tmp_path):
    status, _, err = run("evaluate", f"checkpoint={nested}", "submodel=0.75", "limit=1")
    assert status == 2 and "submodel: the model is trained for 0.125, 0.25, 0.5, 1, and not for 0.75" in err
    for keys, said in (
        (["nesting=mixed", "model.elastic.layers=[0.5,1]"], "'mixed' draws parts of each layer, and layers is no part"),
        (["nesting=sample", "model.elastic.ffn=[0.5,1.5]"], "model.elastic.ffn: a granularity is a part of the whole"),
        (["nesting=none", "model.elastic.ffn=[0.3,1]"], "model.elastic.ffn of layer 0: 0.3 of 32 is no whole number"),
    ):
        status, _, err = run("train", *on_numbers, f"run.dir={tmp_path / 'new'}", *keys)
        assert status == 2 and said in err and not (tmp_path / "new").exists()
