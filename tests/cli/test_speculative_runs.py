"""Drafting with a model inside, from the command line and from Python."""

import json
import logging

import pytest

import efficient_lm as elm
from efficient_lm.cli import main as cli
from efficient_lm.errors import ConfigError

MODEL = ["model.width=16", "model.repeats=2", "mixer.heads=2", "ffn.hidden=32"]
TRAIN = ["tokenizer=bytes", "train.steps=2", "train.batch_size=2", "train.sequence_length=32", "data=files"]


@pytest.fixture(autouse=True)
def own_process_settings(monkeypatch):
    """What the command line sets for its process is none of the other tests' business."""
    monkeypatch.setattr(cli, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(cli, "configure_logging", lambda: None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run that was trained for smaller models inside, and one that was not."""
    root = tmp_path_factory.mktemp("speculative")
    lines = [json.dumps({"text": f"{number} and {number * number} are numbers"}) + "\n" for number in range(40)]
    (root / "text.jsonl").write_text("".join(lines))
    keys = [*MODEL, *TRAIN, f"data.source.paths={root / 'text.jsonl'}", "data.holdout_every=4"]
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "keep_compiled_programs", lambda: None)
        for nesting in ("sample", "none"):
            found[nesting] = root / nesting
            assert cli.main(["train", *keys, f"nesting={nesting}", f"run.dir={found[nesting]}"]) == 0
    return found


def generate(capsys, folder, *keys):
    status = cli.main(["generate", f"checkpoint={folder}", "prompt=A", "max_new_tokens=12", "temperature=0", *keys])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_drafted_text_is_the_same_and_what_was_accepted_is_said(capsys, caplog, folders):
    _, plain, _ = generate(capsys, folders["sample"])
    with caplog.at_level(logging.INFO):
        for keys in (["draft=0.25", "draft_tokens=3"], ["draft=[0.125,0.5]", "draft_confidence=0.6"]):
            status, out, err = generate(capsys, folders["sample"], *keys)
            assert (status, err, out) == (0, "", plain)
    said = [record.message for record in caplog.records if "of drafted tokens accepted" in record.message]
    assert len(said) == 2 and "tokens per verification" in said[0] and "drafted by size" in said[1]


def test_from_python(folders):
    model = elm.load(folders["none"])
    prompts = ["A", "Number 7"]
    plain = model.generate(prompts, 8, temperature=0)
    assert model.generate(prompts, 8, temperature=0, draft={"ffn": 0.5}, draft_tokens=2) == plain
    drafting = model.speculate({"ffn": 0.5}, 2)
    assert drafting is model.speculate({"ffn": 0.5}, 2) and drafting.decoder.report.drafted > 0
    assert drafting.submodel({"ffn": 0.5}).decoder.report is None
    with pytest.raises(ConfigError, match="draft_tokens: at least 1; got 0"):
        model.speculate({"ffn": 0.5}, 0)


@pytest.mark.parametrize(
    ("run", "keys", "said"),
    [
        ("none", ["draft=0.25"], "draft: the model was not trained to have smaller ones inside; name an axis"),
        ("sample", ["draft=0.3"], "draft: the model is trained for 0.125, 0.25, 0.5, 1, and not for 0.3"),
        ("sample", ["draft=1"], "draft: this is the whole model, which verifies; a draft is a smaller part"),
        ("sample", ["draft=[0.25,1]"], "draft: this is the whole model"),
        ("sample", ["draft=[0.5,0.25]"], "draft: sizes ascend, and the whole model comes last of all"),
        ("sample", ["draft.state=0.5"], "state: no layer of the model is elastic along it"),
        ("sample", ["draft=0.25", "draft_tokens=0"], "draft_tokens"),
        ("sample", ["draft=0.25", "skipping=uniform", "skipping.layers=1"], "draft: with skipping=uniform there is no"),
    ],
)  # fmt: skip
def test_faults(capsys, folders, run, keys, said):
    status, _, err = generate(capsys, folders[run], *keys)
    assert status == 2 and said in err
