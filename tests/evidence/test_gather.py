"""Evidence: several small runs, one of which fails, gathered once and not again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from efficient_lm.composition import builtin_configs
from efficient_lm.errors import ConfigError
from efficient_lm.evidence.gather import gather, run_config
from efficient_lm.evidence.spec import read_evidence

ROOT = Path(__file__).parents[2]
NAMES = sorted(file.stem for file in (builtin_configs() / "evidence").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_run_of_every_evidence_can_be_composed(name):
    spec = read_evidence(name)
    points = [*spec.points()]
    for arm in spec.arms:
        config = run_config(spec, Path("runs"), points[-1], arm, 1e-3, spec.seeds[-1])
        assert config.run.dir == f"runs/{config.run.name}"
        assert config.data.reads_text == (spec.measure.kind == "sizes")
        assert config.optimizer.learning_rate == 1e-3 and config.run.seed == spec.seeds[-1]


def small(folder, **options):
    arms = "{good: ['mixer=attention'], bad: ['mixer=attention','model.learned_positions=8']}"
    values = {
        "arms": arms, "grid": "{model.width: [16]}", "learning_rates": "[1e-3, 1e-2]", "seeds": "[0,1]",
        "measure.limit": 4, "measure.lengths": "[8,16]", "expect": "[{arm: good, figure: accuracy, at_least: 0.9}]",
        "runs": folder, "mixer.heads": 2, "model.repeats": 1, "data.length": 16, "data.pairs": 2,
        "data.validation_examples": 8, "train.steps": 2, "train.batch_size": 2, **options,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    assert gather("multi_query_recall", small(folder)) is False
    return folder


@pytest.mark.slow
def test_the_page_and_its_figures(gathered):
    kept = json.loads((gathered / "multi_query_recall.json").read_text())
    good, bad = kept["rows"]
    assert [run["seed"] for run in good["runs"]] == [0, 1] and len(good["tried"]) == 2 and good["model.width"] == 16
    assert good["learning_rate"] in (1e-3, 1e-2) == tuple(run["learning_rate"] for run in good["tried"])
    assert [cell["length"] for cell in good["runs"][1]["lengths"]] == [8, 16]
    assert good["runs"][0]["lengths"][0]["rows"] == 4 and good["runs"][0]["steps"] == 2
    assert [*good["runs"][0]["figures"]] == ["accuracy", "length 8", "length 16"]
    assert "model.learned_positions holds 8" in bad["runs"][0]["error"]
    assert {"cpu", "device", "versions", "date"} <= set(kept)
    page = (gathered / "multi_query_recall.md").read_text()
    assert "| good | 16 |" in page and "| bad | 16 | failed |" in page and "for 3 runs" not in page
    assert "at least 0.9 expected" in page and "not reproduced at this scale" in page


@pytest.mark.slow
def test_what_is_finished_is_not_done_again(gathered, monkeypatch):
    before = json.loads((gathered / "multi_query_recall.json").read_text())["rows"]
    monkeypatch.setattr("efficient_lm.api.load", lambda path: pytest.fail("a finished run was measured again"))
    assert gather("multi_query_recall", small(gathered)) is False
    assert json.loads((gathered / "multi_query_recall.json").read_text())["rows"] == before
    assert gather("multi_query_recall", small(gathered, only="[good]")) is True
    # Other options than those of the finished runs are a fault of each run, and no figure.
    assert gather("multi_query_recall", small(gathered, only="[good]", **{"measure.limit": 3})) is False
    assert "measured with other options" in (gathered / "multi_query_recall.json").read_text()


def test_faults():
    with pytest.raises(ConfigError, match="parety: no such evidence; did you mean 'parity'"):
        read_evidence("parety")
    with pytest.raises(ConfigError, match="no arm is named 'negativ'; did you mean 'negative'"):
        read_evidence("parity", ["only=[negativ]"])
    with pytest.raises(ConfigError, match="seeds: expected a list; got a mapping"):
        read_evidence("parity", ["seeds.first=1"])
    with pytest.raises(ConfigError, match="train.stepz: unknown key; did you mean 'steps'"):
        gather("parity", ["train.stepz=3"])
    with pytest.raises(ConfigError, match="only: the other arms are measured beside 'nested'; name it too"):
        read_evidence("matformer", ["only=[eighth]"])
    with pytest.raises(ConfigError, match="no arm is named 'nestled'; did you mean 'nested'"):
        read_evidence("matformer", ["measure.nested=nestled"])
    assert read_evidence("parity").output is None and read_evidence("parity", ["seeds=[0]"]).output == "runs/evidence"


@pytest.mark.slow
def test_the_script_answers_in_a_line():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "scripts/evidence.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no such evidence; valid: " in done.stderr and "Traceback" not in done.stderr
