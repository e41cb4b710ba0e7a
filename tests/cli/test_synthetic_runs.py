"""A synthetic task from end to end: train, stop at an accuracy, go on, evaluate at other lengths."""

import json

import pytest

from efficient_lm.cli import main as cli
from efficient_lm.training.reporting import read_metrics

OPTIONS = [
    "data=parity", "data.length=8", "data.answers=last", "data.validation_examples=50", "model.width=16",
    "model.repeats=1", "mixer.heads=2", "train.batch_size=4", "train.steps=8", "train.evaluate_every=2",
    "train.evaluate_rows=20", "train.log_every=1", "tracker=none",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "parity"


@pytest.fixture(scope="module")
def trained(folder):
    assert cli.main(["train", *OPTIONS, f"run.dir={folder}"]) == 0
    return folder


def test_train_reports_answers(trained):
    summary, rows = json.loads((trained / "summary.json").read_text()), read_metrics(trained)
    assert summary["step"] == 8 and summary["tokens"] == 8 * 4 * 8 and "val_bits_per_byte" not in summary
    # One answer a row: its accuracy is that of whole rows.
    assert 0 < summary["val_accuracy"] == summary["val_sequence_accuracy"] < 1
    assert [row["step"] for row in rows if "val_accuracy" in row] == [2, 4, 6, 8]
    assert all(row["accuracy"] in (0, 0.25, 0.5, 0.75, 1) for row in rows if "loss" in row)
    assert (trained / "plots" / "loss.png").stat().st_size > 10_000


def test_evaluate_as_in_training_and_at_other_lengths(trained, run, tmp_path):
    output = tmp_path / "scores.json"
    keys = [f"checkpoint={trained}", "batch_size=16", f"output={output}"]
    status, out, err = run("evaluate", *keys)
    assert (status, err) == (0, "") and "word_problem: examples None" in out
    (row,) = json.loads(output.read_text())["answers"]["lengths"]
    summary = json.loads((trained / "summary.json").read_text())
    assert (row["length"], row["answers"], row["rows"]) == (8, 50, 50)
    assert row["accuracy"] == summary["val_accuracy"] and row["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    status, out, _ = run("evaluate", *keys, "sequence_length=[4,8]", "data.answers=every", "limit=30")
    kept = json.loads(output.read_text())
    assert status == 0 and kept["text"] is None and kept["answers"]["data"]["answers"] == "every"
    assert [(row["length"], row["answers"], row["rows"]) for row in kept["answers"]["lengths"]] == [
        (4, 120, 30), (8, 240, 30),
    ]  # fmt: skip
    assert "length  accuracy  whole rows" in out


def test_an_accuracy_that_is_reached_ends_the_run(folder, run):
    path = folder.parent / "solved"
    keys = [*OPTIONS, f"run.dir={path}", "train.stop_at_accuracy=0.05"]
    for _ in range(2):
        status, out, err = run("train", *keys)
        summary = json.loads((path / "summary.json").read_text())
        assert (status, err) == (0, "") and summary["step"] == summary["solved_at"] == 2 and "answers right" in out
    assert "evaluate checkpoint=" in out and "generate" not in out
    status, _, _ = run("train", *OPTIONS, f"run.dir={path}")
    assert status == 0 and json.loads((path / "summary.json").read_text())["step"] == 8


@pytest.mark.parametrize(
    ("verb", "keys", "status", "said"),
    [
        ("evaluate", ["data=word_problem"], 2, "data: has 120 token ids, and the model 2"),
        ("evaluate", ["stride=4"], 2, "stride, begin: are for windows of text"),
        ("evaluate", ["data.lenght=4"], 2, "data.lenght: unknown key; did you mean 'length'"),
        ("evaluate", ["data.length=4", "text=note.txt"], 2, "text: data is given too"),
        ("evaluate", ["text=note.txt"], 3, "came without a tokenizer and takes token ids, not text"),
        ("generate", ["prompt=one"], 3, "came without a tokenizer and takes token ids, not text"),
    ],
)
def test_faults(trained, run, tmp_path, monkeypatch, verb, keys, status, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text("the people")
    found, out, err = run(verb, f"checkpoint={trained}", *keys)
    assert found == status and said in err and err.count("\n") == 1 and (verb == "evaluate" or out == "")
