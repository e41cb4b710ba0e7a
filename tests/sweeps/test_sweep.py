"""A sweep of stub runs: what it writes, what it prints, what it refuses."""

import csv
import io
import json

import pytest
import yaml
from rich.console import Console

from efficient_lm.errors import ConfigError, ResourceError
from efficient_lm.sweeps.checking import Checked, Known
from efficient_lm.sweeps.display import checks_watched
from efficient_lm.sweeps.launchers.local import LocalLauncher
from efficient_lm.sweeps.searches import Objective
from efficient_lm.sweeps.table import lines


def test_a_sweep_writes_what_was_asked_a_table_and_a_run_directory_each(sweep, tmp_path, capsys):
    result = sweep("loss=3,2", "+size=1,2", "seeds=2", "name=mine")
    folder = tmp_path / "sweep"
    assert result.folder == folder and result.stopped_by == 0
    table = json.loads((folder / "table.json").read_text())
    assert (table["sweep"], table["metric"], table["axes"]) == ("mine", "val_loss", ["loss", "size"])
    assert len(table["rows"]) == 8 and table["rows"][1] == {
        "name": "loss_3-size_1-seed_1", "choices": {"loss": 3, "size": 1}, "seed": 1, "state": "finished",
        "run": "runs/loss_3-size_1-seed_1", "reason": "",
        "figures": {"flops": 2.0, "step": 6, "seconds": 1.0, "val_loss": 3.01 + 1 / 6, "parameters": 7},
    }  # fmt: skip
    with open(folder / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows[1]["loss"] == "3" and float(rows[1]["val_loss"]) == 3.01 + 1 / 6
    assert yaml.safe_load((folder / "sweep.yaml").read_text())["axes"] == {"loss": "3,2", "size": "1,2"}
    assert all((folder / row["run"] / "summary.json").is_file() for row in table["rows"])
    printed = capsys.readouterr().out
    assert "4 arms × 2 seeds" in printed and "8/8  loss_2-size_2-seed_1  finished  val_loss 2.1767" in printed
    best = next(line for line in printed.splitlines() if line.startswith(" 1 ") and "2.1717 (2.1667 to 2.1767)" in line)
    assert best.split()[1:3] == ["2", "1"]


def test_a_sweep_that_is_through_runs_nothing_again(sweep, tmp_path):
    first = sweep("loss=3,2")
    assert sweep("loss=3,2").rows == first.rows
    assert (tmp_path / "sweep/runs/loss_2/starts").read_text().count("start") == 1


def test_a_dry_run_writes_nothing(sweep, tmp_path, capsys):
    assert sweep("loss=3,2", "dry_run=true").rows == []
    assert capsys.readouterr().out.startswith("2 arms → ") and not (tmp_path / "sweep").exists()


def test_checks_that_take_long_say_how_far_they_are(monkeypatch):
    quick, long, terminal = io.StringIO(), io.StringIO(), io.StringIO()
    assert checks_watched(Console(file=quick), iter("abc"), 3) == ["a", "b", "c"]
    assert quick.getvalue() == ""
    assert checks_watched(Console(file=terminal, force_terminal=True), iter("abc"), 3) == ["a", "b", "c"]
    assert "checking arms" in terminal.getvalue() and "100%" in terminal.getvalue()
    monkeypatch.setattr("efficient_lm.sweeps.display.CHECKS_SECONDS", 0)
    assert checks_watched(Console(file=long), iter("abc"), 3) == ["a", "b", "c"]
    assert long.getvalue().splitlines() == ["checked 1 of 3 arms", "checked 2 of 3 arms"]


def test_a_folder_of_another_sweep_is_left_as_it_is(sweep, tmp_path):
    sweep("loss=3,2", "steps=4")
    before = {path: path.read_bytes() for path in (tmp_path / "sweep").rglob("*") if path.is_file()}
    for other in (["loss=3,1", "steps=4"], ["loss=3,2", "steps=5"], ["loss=3,2", "steps=4", "seeds=2"]):
        with pytest.raises(ConfigError) as fault:
            sweep(*other)
        assert "study.db: holds another sweep (" in str(fault.value) and "→" in str(fault.value)
    assert before == {path: path.read_bytes() for path in (tmp_path / "sweep").rglob("*") if path.is_file()}


@pytest.mark.parametrize("content", [b"no database, but text of some length" * 30, b""], ids=["text", "empty"])
def test_a_file_that_is_no_study_is_left_as_it_is(sweep, tmp_path, content):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/study.db").write_bytes(content)
    with pytest.raises(ConfigError, match=r"study\.db: (no study|holds no sweep)"):
        sweep("loss=3,2")
    if content:
        assert (tmp_path / "sweep/study.db").read_bytes() == content


def test_a_run_directory_of_another_run_is_not_gone_on_with(sweep, tmp_path):
    sweep("loss=3,2", "steps=4")
    (tmp_path / "sweep/study.db").unlink()
    assert [row.state for row in sweep("loss=3,2", "steps=4").rows] == ["finished"] * 2
    (tmp_path / "sweep/study.db").unlink()
    with pytest.raises(ConfigError, match="loss_3: holds another run"):
        sweep("loss=3,2", "steps=5")


def test_two_arms_that_are_the_same_run_are_refused(sweep, stubbed, monkeypatch):
    def check(self, questions):
        return [Checked((), {}, 0, 6, {"same": True}) for _ in questions]

    monkeypatch.setattr(stubbed.Checker, "check", check)
    with pytest.raises(ConfigError, match="loss_3 and loss_2: the same run twice"):
        sweep("loss=3,2")


def test_faults_name_the_arms_that_have_them(sweep, stubbed, monkeypatch):
    def check(self, questions):
        for question in questions:
            bad = [text for text in question.overrides if text in ("loss=2", "loss=1")]
            yield (ConfigError("x: unknown key") if bad else Checked((), {}, 0, 6, {"of": question.overrides}))

    monkeypatch.setattr(stubbed.Checker, "check", check)
    with pytest.raises(ConfigError, match="^loss_2 and 1 more: x: unknown key$"):
        sweep("loss=3,2,1")
    with pytest.raises(ConfigError, match="^x: unknown key$"):
        sweep("loss=2,1")


def test_a_candidate_that_does_not_fit_is_refused_before_anything_runs(sweep, stubbed, monkeypatch, tmp_path):
    def check(self, questions):
        for number, question in enumerate(questions, start=1):
            yield Checked((), {}, 0, 6, {"of": question.overrides}, Known(memory_bytes=number * 10**9))

    monkeypatch.setattr(stubbed.Checker, "check", check)
    with pytest.raises(ResourceError, match=r"loss_2: its step takes 2\.00 GB, and 1\.50 GB are there"):
        sweep("loss=3,2", "launcher.memory=1.5e9")
    assert not (tmp_path / "sweep").exists()
    assert len(sweep("loss=3,2", "launcher.memory=2e9").rows) == 2


def test_the_budget_and_the_group_of_a_tracker_reach_the_run(sweep, stubbed, monkeypatch, tmp_path, capsys):
    def check(self, questions):
        for question in questions:
            config = {"of": question.overrides}
            yield Checked(("+tracker.group=mine",), {}, 0, 6, config, Known(("steps=3",), {"width": 48}))

    monkeypatch.setattr(stubbed.Checker, "check", check)
    rows = sweep("loss=3,2").rows
    assert [row.figures["step"] for row in rows] == [3, 3]
    assert "width" in capsys.readouterr().out
    written = json.loads((tmp_path / "sweep/runs/loss_3/config.yaml").read_text())
    assert "+tracker.group=mine" in written["overrides"]


def test_a_run_that_cannot_be_started_waits_while_others_run(sweep, stubbed, monkeypatch, caplog):
    submit, refused = LocalLauncher.submit, []

    def full(launcher, job):
        if job.name == "loss_2" and not refused:
            refused.append(job.name)
            raise ResourceError("loss_2: cannot be submitted: the queue is full")
        return submit(launcher, job)

    monkeypatch.setattr(stubbed.running, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(LocalLauncher, "submit", full)
    result = sweep("loss=3,2", "launcher.concurrent=2")
    assert [row.state for row in result.rows] == ["finished"] * 2 and refused
    assert "the queue is full; tried again" in caplog.text
    refused.clear()
    with pytest.raises(ResourceError, match="the queue is full"):
        sweep("loss=2,3", "seeds=1", "name=other", f"dir={result.folder}.other")


def test_a_figure_that_no_run_has_fails_them(sweep):
    rows = sweep("loss=3,2", "metric=val_accuracy").rows
    assert {(row.state, row.reason) for row in rows} == {("failed", "summary.json has no finite val_accuracy")}


def test_arms_are_sorted_by_their_metric():
    from efficient_lm.sweeps.table import Row

    rows = [Row(name, {"a": name}, 0, "finished", "", {"x": x}) for name, x in (("p", 1), ("q", 3), ("r", 2))]
    rows.append(Row("s", {"a": "s"}, 0, "failed", "", {"x": 0}))
    order = [line.choices["a"] for line in lines(rows, [Objective(name="x")])]
    assert order == ["p", "r", "q", "s"]
    order = [line.choices["a"] for line in lines(rows, [Objective(name="x", direction="maximize")])]
    assert order == ["q", "r", "p", "s"]


def test_what_a_measured_budget_gave_stays_when_the_sweep_goes_on(sweep, stubbed, monkeypatch, table, tmp_path):
    asked = []

    def check(self, questions):
        for question in questions:
            asked.append(question.known)
            known = question.known or Known((f"steps={len(asked) + 2}",), {"measured": len(asked)})
            yield Checked((), {}, 0, 6, {"of": [*question.overrides, *known.overrides]}, known)

    monkeypatch.setattr(stubbed.Checker, "check", check)
    sweep("loss=3,2")
    for path in (tmp_path / "sweep/runs/loss_2").glob("summary.json"):
        path.unlink()
    assert [row.figures["step"] for row in sweep("loss=3,2").rows] == [3, 4]
    assert [known.overrides for known in asked[2:]] == [("steps=3",), ("steps=4",)]
