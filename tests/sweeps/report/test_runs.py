"""What run directories tell, whole and in pieces."""

import json
import os

import numpy as np
import pytest

from efficient_lm.sweeps.report import runs
from efficient_lm.sweeps.report.runs import LEAST, POINTS, flat, read, read_all
from efficient_lm.sweeps.report.sources import Found


def test_a_finished_run(made_run):
    run = read(Found(made_run("a", 3.0, rate=2e-3, seed=4, width=32)))
    assert (run.name, run.state, run.faults, run.seed, run.learning_rate) == ("a", "finished", (), 4, 2e-3)
    assert run.ended and run.choices is None and run.config["model.blocks.layer.mixer.kind"] == "attention"
    assert run.figures["val_loss"] == pytest.approx(3.1) and run.figures["parameters"] == 32_000
    assert run.figures["training_flops_per_token"] == pytest.approx(6e3 * 32)
    assert run.figures["tokens_per_second"] == 200 and run.figures["loss"] == pytest.approx(3.0, abs=0.1)
    assert run.training["tokens"].tolist() == list(range(1000, 20_001, 1000))
    # Rows of evaluations do not say when they were.
    assert run.validation["seconds"].tolist() == [25, 50, 75, 100]
    assert run.validation["val_loss"][-1] == pytest.approx(3.1, abs=0.01)


def test_a_model_that_another_verb_made(made_run):
    folder = made_run("half")
    for name in ("metrics.jsonl", "summary.json"):
        (folder / name).unlink()
    run = read(Found(folder))
    assert run.state == "unfinished" and run.config and len(run.faults) == 1 and "nothing was trained" in run.faults[0]


def last_line(text):
    return text.rstrip("\n").rpartition("\n")


@pytest.mark.parametrize(
    ("harm", "state", "said"),
    [
        (lambda run: (run / "summary.json").unlink(), "unfinished", "no summary.json"),
        (lambda run: (run / "summary.json").write_text('{"step": 2'), "unfinished", "summary.json: cannot be read"),
        (lambda run: (run / "summary.json").write_text("[]"), "unfinished", "summary.json: cannot be read: not an obj"),
        (lambda run: (run / "metrics.jsonl").unlink(), "finished", "no metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "finished", "metrics.jsonl has no row"),
        (lambda run: (run / "config.yaml").unlink(), "finished", "no config.yaml"),
        (lambda run: (run / "config.yaml").write_text("a: [1\nb"), "finished", "config.yaml:2: cannot be read"),
        (
            lambda run: (run / "config.yaml").write_text("a: !!python/name:os.system x\n"),
            "finished",
            "tags are refused",
        ),
        (lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\x00"), "finished", "config.yaml: cannot be read"),
        (lambda run: (run / "config.yaml").write_text("- 1\n"), "finished", "config.yaml: cannot be read: holds no m"),
        (lambda run: os.mkfifo(run / "pipe") or os.replace(run / "pipe", run / "metrics.jsonl"), "finished", "regular"),
    ],
)
def test_what_is_missing_or_broken_is_said(harm, state, said, made_run):
    folder = made_run("a")
    harm(folder)
    run = read(Found(folder))
    assert run.state == state and len(run.faults) == 1 and said in run.faults[0]
    assert str(folder) not in run.faults[0] and "\n" not in run.faults[0]


def test_torn_and_foreign_lines_are_left_out(made_run):
    folder = made_run("a")
    before, _, last = last_line((folder / "metrics.jsonl").read_text())
    (folder / "metrics.jsonl").write_text(f"{before}\n{last[:20]}")
    torn = read(Found(folder))
    assert torn.faults == ("the last line of metrics.jsonl is torn and is left out",)
    assert len(torn.training["loss"]) == 20 and len(torn.validation["val_loss"]) == 3
    lines = before.split("\n")
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], "[1, 2]", "nonsense", *lines[1:], ""]))
    run = read(Found(folder))
    assert run.faults == ("metrics.jsonl: line 2 and 1 more is no JSON object and is left out",)
    assert len(run.training["loss"]) == 20


def test_values_that_are_none_do_no_harm(made_run):
    folder = made_run("a")
    rows = [{"step": 1, "tokens": "many", "loss": True}, {"loss": 1e999, "tokens": 1}, {"loss": [1]}, {"val_loss": {}},
            {"loss": 2.0, "tokens": 10, "seconds": None, "step": 10**400}]  # fmt: skip
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "summary.json").write_text(json.dumps({"step": 1, "tokens": 0, "parameters": None, "val_loss": "low"}))
    run = read(Found(folder))
    assert run.state == "finished" and run.training["loss"].tolist() == [2.0]
    assert np.isnan(run.training["seconds"]).all() and set(run.figures) <= {"step", "tokens", "loss"}


@pytest.mark.parametrize(
    ("summary", "state"),
    [({"stopped_by": "SIGTERM"}, "interrupted"), ({"stopped_by": "train.minutes"}, "stopped"), ({}, "finished")],
)
def test_how_a_run_ended(summary, state, made_run):
    run = read(Found(made_run("a", **summary, step=40)))
    assert run.state == state and run.ended == (state != "interrupted")
    assert run.faults == ((f"stopped by {summary['stopped_by']} at step 40 of 200",) if summary else ())


def test_a_loss_that_is_no_number_at_the_end(made_run):
    folder = made_run("a")
    (folder / "summary.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 201, "tokens": 20100, "loss": null}\n')
    run = read(Found(folder))
    assert run.state == "diverged" and "the loss is no number at step 201" in run.faults


def test_what_the_sweep_knows(made_run, tmp_path):
    folder = made_run("a")
    row = {"name": "arm-1", "choices": {"mixer": "gla"}, "seed": 3, "state": "finished", "reason": None,
           "figures": {"params": 7, "latency_ms": 1.5, "val_loss": 9.0}}  # fmt: skip
    run = read(Found(folder, row, "sweep"))
    assert (run.name, run.seed, run.choices, run.sweep) == ("arm-1", 3, {"mixer": "gla"}, "sweep")
    # What the run itself wrote goes first.
    assert run.figures["latency_ms"] == 1.5 and run.figures["parameters"] == 64_000
    assert run.figures["val_loss"] == pytest.approx(3.1)
    failed = read(Found(folder, row | {"state": "failed", "reason": "resources: out\nof memory"}, "sweep"))
    assert failed.state == "failed" and not failed.ended and failed.faults == ("resources: out of memory",)
    waiting = read(Found(tmp_path / "runs" / "none", row | {"state": "waiting"}, "sweep"))
    assert waiting.state == "waiting" and waiting.faults == ("not begun",)
    gone = read(Found(tmp_path / "runs" / "none", row, "sweep"))
    assert gone.faults == ("its directory is missing",) and gone.figures["val_loss"] == 9.0


def test_plans_of_runs_that_have_not_ended_are_no_speeds(made_run):
    folder = made_run("a")
    (folder / "summary.json").unlink()
    row = {"state": "running", "figures": {"training_flops": 6e9, "tokens": 1e6}}
    run = read(Found(folder, row, "sweep"))
    assert run.figures["training_flops_per_token"] == 6e3 and run.figures["tokens"] == 20_000


def test_long_curves_are_thinned_and_keep_their_ends(made_run):
    folder = made_run("a")
    rows = [{"step": step, "tokens": step, "seconds": step, "loss": 9 / step} for step in range(1, 2001)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokens = read(Found(folder)).training["tokens"]
    assert len(tokens) <= POINTS and (tokens[0], tokens[-1]) == (1, 2000) and (np.diff(tokens) > 0).all()
    assert np.sum(tokens < 200) > 0.2 * len(tokens)


def test_many_runs_have_shorter_curves(made_run, monkeypatch):
    monkeypatch.setattr(runs, "ALL", 100)
    found = [Found(made_run("a"))] * 20
    rows = [{"step": step, "tokens": step, "seconds": step, "loss": 9 / step} for step in range(1, 200)]
    (found[0].path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert 20 < len(read_all(found)[-1].training["tokens"]) <= LEAST < len(read_all(found[:2])[0].training["tokens"])


def test_the_last_evaluation_of_all_rows_is_no_point_of_the_curve(made_run):
    folder = made_run("a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 200, "tokens": 20000, "val_loss": 3.5, "final": true}\n')
    assert len(read(Found(folder)).validation["val_loss"]) == 4
    (folder / "metrics.jsonl").write_text('{"step": 200, "tokens": 20000, "val_loss": 3.5, "final": true}\n')
    assert read(Found(folder)).validation["val_loss"].tolist() == [3.5]


def test_configs_are_read_as_a_whole_where_sections_do_not_stand_alone(made_run):
    folder = made_run("a")
    (folder / "config.yaml").write_text(
        "# by hand\nrun: {name: mine,\n  seed: 2}\nmodel:\n  blocks: {}\ntrain: {steps: 5}\n"
    )
    run = read(Found(folder))
    assert run.name == "mine" and run.seed == 2 and run.config["train.steps"] == 5 and run.faults == ()
    (folder / "config.yaml").write_text("run: {name: a}\nrun: {name: b}\n")
    assert "comes twice" in read(Found(folder)).faults[0]


def test_flat():
    assert flat({"a": {"b": [1, 2], "c": {}}, "d": None}) == {"a.b": [1, 2], "a.c": {}, "d": None}
