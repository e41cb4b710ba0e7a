"""The sizes of a nested model, beside models that were trained by themselves."""

import json

import pytest

from efficient_lm.evidence.gather import gather
from efficient_lm.evidence.measures.sizes import SizesSpec, choices, figures_of


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    text = folder / "numbers.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} and {n * n} are numbers"}) + "\n" for n in range(40)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFICIENT_LM_CACHE", str(folder / "cache"))
        given = {
            "arms": "{nested: ['nesting=sample','model.elastic={ffn: [0.5,1]}'], half: ['ffn.hidden=16'], "
            "plain: ['model.elastic={ffn: [0.5,1]}'], other: ['ffn.hidden=24']}",
            "expect": "[{arm: nested, figure: '0.5', over: half, at_most: 2}]",
            "seeds": "[0]", "measure.rows": 2, "measure.random": 1, "runs": folder, "model.width": 16,
            "model.repeats": 2, "mixer.heads": 2, "ffn.hidden": 32, "tokenizer": "bytes", "data": "files",
            "data.source.paths": text, "data.holdout_every": 4, "train.steps": 2, "train.batch_size": 2,
            "train.sequence_length": 32, "train.checkpoint_every": 2,
        }  # fmt: skip
        assert gather("matformer", [f"{key}={value}" for key, value in given.items()]) is False
    return folder


@pytest.mark.slow
def test_each_arm_has_the_figures_of_its_sizes(gathered):
    rows = {row["arm"]: row["runs"][0] for row in json.loads((gathered / "matformer.json").read_text())["rows"]}
    assert {"0.5", "1", "draft 0.5", "mixes near", "worst mix"} <= set(rows["nested"]["figures"])
    assert set(rows["half"]["figures"]) == {"0.5", "draft 0.5"} and set(rows["plain"]["figures"]) == {"0.5", "1"}
    assert 0 < rows["half"]["figures"]["draft 0.5"] <= rows["nested"]["figures"]["draft 0.5"] <= 1
    sizes = {arm: [size["parameters"] for size in rows[arm]["sizes"]] for arm in ("nested", "half", "plain")}
    assert sizes["plain"] == sizes["nested"] == [sizes["half"][0], rows["plain"]["parameters"]]
    assert "parameters, and the models inside nested" in rows["other"]["error"]
    # A plain run and a nested one begin alike.
    assert rows["nested"]["figures"]["1"] == pytest.approx(rows["plain"]["figures"]["1"], rel=0.05)


@pytest.mark.slow
def test_the_page_and_the_picture(gathered):
    text = (gathered / "matformer.md").read_text()
    assert "nested, 0.5 over that of half: at most 2 expected" in text and "![Matformer](matformer.png)" in text
    assert (gathered / "matformer.png").read_bytes().startswith(b"\x89PNG")


def test_which_mixes_there_are():
    kinds = {}
    for kind, levels in choices(4, 4, 20):
        kinds.setdefault(kind, []).append(levels)
    assert {kind: len(found) for kind, found in kinds.items()} == {"uniform": 4, "mix": 9, "growth": 22, "random": 20}
    assert len({levels for found in kinds.values() for levels in found}) == 55
    assert all(levels[-1] - levels[0] == 1 for levels in kinds["mix"])
    assert len([*choices(2, 2, 20)]) == 4


def test_a_mix_is_held_against_the_line():
    mixes = [
        {"kind": "mix", "loss": 2.01, "line": 2.0, "below": 2.5},
        {"kind": "mix", "loss": 2.1, "line": 2.0, "below": 2.0},
        {"kind": "growth", "loss": 1.0, "line": 2.0, "below": 2.0},
        {"kind": "uniform", "loss": 1.0},
    ]
    figures = figures_of(mixes)
    assert figures == {"mixes near": 0.5, "mixes near of any growth": pytest.approx(2 / 3), "worst mix": 1.05}
    assert figures_of([*mixes, {**mixes[1], "kind": "random"}])["random mixes near"] == 0


def test_the_largest_size_is_what_learning_rates_are_chosen_by():
    figures = {"0.5": 1.0, "1": 3.0, "draft 0.5": 0.9}
    assert SizesSpec(nested="nested").quality(figures) == -3.0
