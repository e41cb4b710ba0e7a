"""An audit finds each fault that was put in a run directory, and none in one that is as it should be."""

import json
import shutil
from pathlib import Path

import pytest

from efficient_lm.config import load_run_config
from efficient_lm.training.loop import train
from efficient_lm.verification.audit import audit
from efficient_lm.verification.findings import State

OLD = Path(__file__).parent.parent / "goldens" / "old_run"
TOKEN = "hf_" + 10 * "aB3x"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of six steps, its text beside it."""
    folder = tmp_path_factory.mktemp("audited")
    shutil.copy(OLD / "text.jsonl", folder)
    keys = ["model.width=8", "model.repeats=1", "mixer.heads=2", "tokenizer=bytes", "data=files", "train.log_every=1"]
    short = ["train.steps=6", "train.batch_size=2", "train.sequence_length=32", "train.checkpoint_every=3"]
    place = [f"data.source.paths=[{folder}/text.jsonl]", f"run.dir={folder}/run"]
    train(load_run_config([*keys, *short, *place, "train.evaluate_rows=2"]))
    return folder / "run"


@pytest.fixture
def copied(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def found(folder, state):
    return [f"{finding.what}: {finding.text}" for finding in audit(folder) if finding.state == state]


def test_a_run_as_it_should_be(trained):
    findings = audit(trained)
    assert {finding.state for finding in findings} == {State.OK}, findings
    named = {
        "config",
        "checkpoint 3",
        "checkpoint 6",
        "parameters",
        "tokenizer",
        "metrics",
        "summary",
        "data",
        "secrets",
    }
    assert {finding.what for finding in findings} == named


def test_a_run_of_an_earlier_version_has_warnings_at_most(monkeypatch):
    monkeypatch.chdir(OLD.parents[2])
    assert found(OLD, State.FAULT) == []
    assert len(found(OLD, State.WARNING)) == 3, "two checkpoints without checksums, data without a fingerprint"


def flip(folder):
    largest = max((folder / "checkpoints" / "6").rglob("*"), key=lambda path: path.is_file() * path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)


def edit_lines(folder, change):
    path = folder / "metrics.jsonl"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def edit_summary(folder, **values):
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


FAULTS = {
    "checkpoint 6: damaged: ": flip,
    "config: ": lambda folder: (folder / "config.yaml").write_text("model: {width: eight}"),
    "tokenizer: ": lambda folder: shutil.rmtree(folder / "tokenizer"),
    "metrics: step 3 comes after step 3": lambda folder: edit_lines(folder, lambda rows: rows[:3] + rows[2:]),
    "not a JSON object": lambda folder: edit_lines(folder, lambda rows: [rows[0], "{\n", *rows[1:]]),
    "summary: tokens is 7 and should be": lambda folder: edit_summary(folder, tokens=7),
    "summary: step is 60 and should be 6": lambda folder: edit_summary(folder, step=60),
    "notes.txt holds a Hugging Face token": lambda folder: (folder / "notes.txt").write_text(f"token: {TOKEN}"),
}


@pytest.mark.parametrize("words", FAULTS)
def test_each_fault_is_found(copied, words):
    FAULTS[words](copied)
    faults = found(copied, State.FAULT)
    assert len(faults) == 1 and words in faults[0], faults
    assert TOKEN not in str(audit(copied))


WARNINGS = {
    "there is no row of step 4": lambda folder: edit_lines(folder, lambda rows: rows[:3] + rows[4:]),
    "the last line is torn": lambda folder: edit_lines(folder, lambda rows: [*rows, '{"step": 7, "lo']),
    "summary: there is none": lambda folder: (folder / "summary.json").unlink(),
    "summary: is of step 3, and the run went on to 6": lambda folder: edit_summary(folder, step=3, tokens=7),
    "of a save that did not end: 9": lambda folder: (folder / "checkpoints/unfinished/9").mkdir(parents=True),
    "set aside: damaged_checkpoint_9": lambda folder: (folder / "damaged_checkpoint_9").mkdir(),
}  # fmt: skip


@pytest.mark.parametrize("words", WARNINGS)
def test_each_warning_is_given(copied, words):
    WARNINGS[words](copied)
    assert found(copied, State.FAULT) == []
    warnings = found(copied, State.WARNING)
    assert len(warnings) == 1 and words in warnings[0], warnings


def test_other_data_is_a_fault_and_absent_data_a_warning(trained):
    text = trained.parent / "text.jsonl"
    before = text.read_text()
    try:
        text.write_text(before.replace("peace", "truce"))
        assert "data: is not what was trained on" in str(found(trained, State.FAULT))
        text.unlink()
        assert found(trained, State.FAULT) == []
        assert "cannot be opened here" in str(found(trained, State.WARNING))
    finally:
        text.write_text(before)


def test_the_value_of_a_secret_variable_is_found(copied, monkeypatch):
    monkeypatch.setenv("SOME_TRACKER_TOKEN", "not-of-any-known-shape")
    (copied / "environment.json").write_text('{"set": "not-of-any-known-shape"}')
    assert "environment.json holds the value of SOME_TRACKER_TOKEN" in str(found(copied, State.FAULT))
