"""Models that were not trained to be smaller, cut from the command line and from Python."""

import json

import numpy as np
import pytest

import efficient_lm as elm
from efficient_lm.cli import main as cli

MODEL = ["model.width=16", "model.repeats=2", "mixer.heads=2", "ffn.hidden=32"]
TRAIN = ["tokenizer=bytes", "train.steps=3", "train.batch_size=2", "train.sequence_length=32", "data=files"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    root = tmp_path_factory.mktemp("order")
    lines = [json.dumps({"text": f"{number} and {number * number} are numbers"}) + "\n" for number in range(40)]
    (root / "text.jsonl").write_text("".join(lines))
    source = [f"data.source.paths={root / 'text.jsonl'}", "data.holdout_every=4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "keep_compiled_programs", lambda: None)
        assert cli.main(["train", *MODEL, *TRAIN, *source, f"run.dir={root / 'plain'}"]) == 0
    return root / "plain"


@pytest.fixture(autouse=True)
def own_process_settings(monkeypatch):
    monkeypatch.setattr(cli, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(cli, "configure_logging", lambda: None)


def down(model):
    return np.asarray(model.params["stack"]["segment_0"]["layer_0"]["ffn"]["inner"]["down"]["weight"])


def test_the_most_active_units_are_extracted(capsys, plain, tmp_path):
    model, found = elm.load(plain), {}
    for name, keys in {"left_out": [], "active": ["order=activation"], "first": ["order=none"]}.items():
        arguments = ["extract", f"checkpoint={plain}", f"output={tmp_path / name}", "ffn=0.5", "limit=4", *keys]
        assert cli.main(arguments) == 0, capsys.readouterr().err
        found[name] = down(elm.load(tmp_path / name))
    np.testing.assert_array_equal(found["first"], down(model)[:, :16])
    np.testing.assert_array_equal(found["left_out"], found["active"])
    assert not np.array_equal(found["active"], found["first"])
    np.testing.assert_array_equal(down(model.extract(ffn=0.5, rows=4)), found["active"])
    text = str(plain.parent / "text.jsonl")
    heavy = down(model.extract(ffn=0.5, order="weight", text=text))
    rows = {tuple(row) for row in down(model)[0]}
    assert {tuple(row) for row in heavy[0]} < rows and heavy.shape == found["active"].shape
    assert model.extract(layers=0.5, rows=4).config.model.numbering.layers in ((0,), (1,))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["ffn=0.5", "order=activations"], "order: "),
        (["experts=[0]", "order=weight"], "order: it says which units a part of an axis keeps"),
        (["ffn=0.5", "order=none", "text=missing.txt"], "text: nothing is measured; it is for a number of experts"),
        (["ffn=0.5", "text=missing.txt"], "missing.txt"),
        (["ffn=0.5", "uneven=true"], "uneven: nothing is measured"),
    ],
)
def test_faults_write_nothing(capsys, plain, tmp_path, keys, said):
    assert cli.main(["extract", f"checkpoint={plain}", f"output={tmp_path / 'new'}", *keys]) != 0
    assert said in capsys.readouterr().err and not (tmp_path / "new").exists()
