"""Drafting with a model inside, from the command line and from Python."""

import logging

import pytest

import efficient_lm as elm
from efficient_lm.errors import ConfigError

KEYS = ["prompt=A", "max_new_tokens=12", "temperature=0"]


@pytest.mark.slow
def test_drafted_text_is_the_same_and_what_was_accepted_is_said(run, caplog, nested):
    _, whole, _ = run("generate", f"checkpoint={nested}", *KEYS)
    with caplog.at_level(logging.INFO):
        for keys in (["draft=0.25", "draft_tokens=3"], ["draft=[0.125,0.5]", "draft_confidence=0.6"]):
            status, out, err = run("generate", f"checkpoint={nested}", *KEYS, *keys)
            assert (status, err, out) == (0, "", whole)
    said = [record.message for record in caplog.records if "of drafted tokens accepted" in record.message]
    assert len(said) == 2 and "tokens per verification" in said[0] and "drafted by size" in said[1]


@pytest.mark.slow
def test_from_python(plain):
    model = elm.load(plain)
    prompts = ["A", "Number 7"]
    text = model.generate(prompts, 8, temperature=0)
    assert model.generate(prompts, 8, temperature=0, draft={"ffn": 0.5}, draft_tokens=2) == text
    drafting = model.speculate({"ffn": 0.5}, 2)
    assert drafting is model.speculate({"ffn": 0.5}, 2) and drafting.decoder.report.drafted > 0
    assert drafting.submodel({"ffn": 0.5}).decoder.report is None
    with pytest.raises(ConfigError, match="draft_tokens: at least 1; got 0"):
        model.speculate({"ffn": 0.5}, 0)
    for sizes in ([], [{"ffn": 0.5}, {"ffn": 0.25}]):
        with pytest.raises(ConfigError, match="draft: sizes ascend, and the whole model comes last of all"):
            model.speculate(sizes)


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        ("plain", ["draft=0.25"], "draft: the model was not trained to have smaller ones inside; name an axis"),
        ("nested", ["draft=0.3"], "draft: the model is trained for 0.125, 0.25, 0.5, 1, and not for 0.3"),
        ("nested", ["draft=1"], "draft: this is the whole model, which verifies; a draft is a smaller part"),
        ("nested", ["draft=[0.25,1]"], "draft: this is the whole model"),
        ("nested", ["draft.ffn.layer=1"], "draft: this is the whole model"),
        ("nested", ["draft=[0.5,0.25]"], "draft: sizes ascend, and the whole model comes last of all"),
        ("nested", ["draft.state=0.5"], "state: no layer of the model is elastic along it"),
        ("nested", ["draft=0.25", "draft_tokens=0"], "draft_tokens: expected at least 1; got 0"),
        ("nested", ["draft_tokens=3"], "draft_tokens: nothing is drafted; add draft=0.25, or leave it out"),
        ("nested", ["draft=0.25", "skipping=uniform", "skipping.layers=1"], "draft: with skipping=uniform there is no"),
    ],
)  # fmt: skip
def test_faults(run, request, kind, keys, said):
    status, _, err = run("generate", f"checkpoint={request.getfixturevalue(kind)}", *KEYS, *keys)
    assert status == 2 and said in err
