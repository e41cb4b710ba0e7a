"""Elastic models from the command line: trained, used at a smaller size, extracted."""

import json

import numpy as np
import pytest

import efficient_lm as elm
from efficient_lm.cli import main as cli

MODEL = ["model.width=16", "model.repeats=2", "mixer.heads=2", "ffn.hidden=32"]
TRAIN = ["tokenizer=bytes", "train.steps=3", "train.batch_size=2", "train.sequence_length=32", "data=files"]
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


def _on(root):
    return [*TRAIN, f"data.source.paths={root / 'text.jsonl'}", "data.holdout_every=4"]


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    root = tmp_path_factory.mktemp("elastic")
    lines = [json.dumps({"text": f"{number} and {number * number} are numbers"}) + "\n" for number in range(40)]
    (root / "text.jsonl").write_text("".join(lines))
    folder = root / "nested"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "keep_compiled_programs", lambda: None)
        assert cli.main(["train", *MODEL, *_on(root), "nesting=sample", f"run.dir={folder}"]) == 0
    return folder


def test_every_size_is_validated(nested):
    summary = json.loads((nested / "summary.json").read_text())
    sizes = {name for name in summary if name.startswith("val_bits_per_byte")}
    assert sizes == {"val_bits_per_byte", *(f"val_bits_per_byte_{part}" for part in ("0.125", "0.25", "0.5"))}
    smallest, *_, whole = summary["sizes"]
    assert smallest["bits_per_byte"] == summary["val_bits_per_byte_0.125"] and smallest["parts"] == {"ffn": 0.125}
    assert whole["parameters"] == summary["parameters"] > smallest["parameters"]
    assert (nested / "plots" / "sizes.png").stat().st_size > 10_000
    whole, half = (elm.load(nested, submodel=part).evaluate(limit=2)["tokens"] for part in (1.0, 0.5))
    assert whole == half


def test_it_is_used_and_extracted_at_a_smaller_size(capsys, nested, tmp_path):
    where = tmp_path / "half"
    status, out, err = run(capsys, "extract", f"checkpoint={nested}", f"output={where}", "ffn=0.5")
    assert (status, err) == (0, "") and f"M parameters → {where}" in out
    half, inside = elm.load(where), elm.load(nested, submodel=0.5)
    np.testing.assert_array_equal(half.logits(TOKENS), inside.logits(TOKENS))
    assert half.config.model.blocks["layer"].ffn.hidden == 16
    assert half.config.model.elastic.ffn == (0.25, 0.5, 1.0) and half.config.nesting.kind == "none"
    np.testing.assert_array_equal(half.submodel(0.5).logits(TOKENS), elm.load(nested, submodel=0.25).logits(TOKENS))
    scores = [tmp_path / f"{name}.json" for name in ("inside", "half")]
    for source, keys, kept in ((nested, ["submodel=0.5"], scores[0]), (where, [], scores[1])):
        assert run(capsys, "evaluate", f"checkpoint={source}", "limit=2", f"output={kept}", *keys)[0] == 0
    first, second = (json.loads(path.read_text())["text"]["bits_per_byte"] for path in scores)
    assert first == second
    status, out, _ = run(
        capsys, "generate", f"checkpoint={nested}", "submodel.ffn=0.25", "prompt=A", "max_new_tokens=2"
    )
    assert status == 0 and out.startswith("A")
    keys = [*_on(nested.parent), f"init_from={where}", f"run.dir={tmp_path / 'on'}"]
    status, _, err = run(capsys, "train", *keys, "nesting=sample")
    assert status == 0, err
    assert "val_bits_per_byte_0.25" in json.loads((tmp_path / "on" / "summary.json").read_text())


def test_layers_and_blocks(capsys, nested, tmp_path):
    for name, keys, hidden in (
        ("uneven", ["ffn=[0.25,1]"], [8, 32]),
        ("by_block", ["ffn.layer=0.5"], [16, 16]),
        ("shallow", ["layers=[1]"], [32]),
    ):
        status, _, err = run(capsys, "extract", f"checkpoint={nested}", f"output={tmp_path / name}", *keys)
        assert (status, err) == (0, "")
        model = elm.load(tmp_path / name)
        assert [layer.ffn.hidden_size(16) for layer in model.model.layers] == hidden
        assert np.all(np.isfinite(model.logits(TOKENS)))
    assert elm.load(tmp_path / "shallow").config.model.numbering.layers == (1,)


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
def test_faults_write_nothing(capsys, nested, tmp_path, keys, said):
    status, _, err = run(capsys, "extract", f"checkpoint={nested}", f"output={tmp_path / 'new'}", *keys)
    assert status == 2 and said in err and not (tmp_path / "new").exists()


def test_sizes_there_are_not(capsys, nested):
    status, _, err = run(capsys, "evaluate", f"checkpoint={nested}", "submodel=0.75", "limit=1")
    assert status == 2 and "submodel: the model is trained for 0.125, 0.25, 0.5, 1, and not for 0.75" in err
    keys = [*MODEL, *_on(nested.parent), "nesting=mixed", "run.dir=nowhere", "model.elastic.layers=[0.5,1]"]
    status, _, err = run(capsys, "train", *keys)
    assert status == 2 and "'mixed' draws parts of each layer, and layers is no part of one" in err
