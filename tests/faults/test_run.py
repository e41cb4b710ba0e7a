"""Data that goes, signals at bad moments, and batches that do harm, in a run of twelve steps."""

import os
import signal
import time

import numpy as np
import pytest

from efficient_lm.data.batch_sizes import BatchSizes
from efficient_lm.data.dataset import TextData
from efficient_lm.errors import DataError, DivergedError
from efficient_lm.training import session as module
from efficient_lm.training.checkpoints import Checkpoints
from efficient_lm.training.reporting import read_metrics


@pytest.fixture
def tokens(tmp_path, monkeypatch):
    """``tokens()`` → the file of this test's own cache that the data is read from."""
    monkeypatch.setenv("EFFICIENT_LM_CACHE", str(tmp_path / "cache"))
    return lambda: next((tmp_path / "cache").rglob("tokens.bin"))


def test_data_that_is_deleted_stays_readable(train, curve, whole, tmp_path, tokens, at_step):
    at_step(5, lambda: tokens().unlink())
    train(tmp_path / "run")
    assert curve(tmp_path / "run") == whole


def test_data_that_becomes_shorter_stops_the_run_with_everything_saved(
    train, curve, whole, tmp_path, tokens, at_step, text
):
    folder = tmp_path / "run"
    at_step(5, lambda: os.truncate(tokens(), 100))
    with pytest.raises(DataError, match=r"tokens.bin' became shorter .*; the newest good checkpoint is (\d+)") as error:
        train(folder)
    assert error.value.status == 3
    steps = [row["step"] for row in read_metrics(folder) if "loss" in row]
    assert steps[-1] >= 5 and Checkpoints(folder / "checkpoints").steps[-1] == steps[-1]
    text.rename(text.with_suffix(".away"))
    try:
        with pytest.raises(DataError, match="no file"):
            train(folder)
    finally:
        text.with_suffix(".away").rename(text)
    # What is left of the cache is seen to be torn, and made again.
    assert train(folder)["step"] == 12 and curve(folder) == whole


def request(number):
    os.kill(os.getpid(), number)
    time.sleep(0.3)


@pytest.mark.slow
def test_a_signal_puts_an_evaluation_off(train, curve, tmp_path, monkeypatch):
    options = {"train.evaluate_rows": "null"}
    train(tmp_path / "whole", **options)
    folder, score, calls = tmp_path / "run", module.evaluate, []

    def interrupted(scorer, params, batches, *others):
        calls.append(len(calls))

        def signalled():
            for number, batch in enumerate(batches):
                yield batch
                if number == 0 and calls[-1] in (0, 2):
                    request(signal.SIGTERM)

        return score(scorer, params, signalled(), *others)

    monkeypatch.setattr(module, "evaluate", interrupted)
    for step, rows in ((6, 6), (12, 13)):
        summary = train(folder, **options)
        assert summary["step"] == step and summary["stopped_by"] == "SIGTERM"
        assert len(curve(folder)) == rows and Checkpoints(folder / "checkpoints").steps[-1] == step
    assert "stopped_by" not in train(folder, **options)
    assert curve(folder) == curve(tmp_path / "whole") and len(calls) == 4


@pytest.mark.parametrize("step", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_signal_while_something_else_is_done(train, curve, whole, tmp_path, at_step, step):
    """In the first step, after compiling; and between two checkpoints."""
    at_step(step, lambda: request(signal.SIGINT))
    summary = train(tmp_path / "run")
    assert summary["stopped_by"] == "SIGINT" and summary["step"] == step
    assert train(tmp_path / "run")["step"] == 12 and curve(tmp_path / "run") == whole


class Harmed:
    """Batches of which some do harm, and the places in the data that were asked for."""

    def __init__(self, monkeypatch, harm, places):
        self.asked, read = [], TextData.train_batches

        def batches(data, sizes, start_step=0, *arguments):
            first = BatchSizes.of(sizes).first(start_step) // 4
            for number, batch in enumerate(read(data, sizes, start_step, *arguments), start=first):
                self.asked.append(number)
                yield harm(dict(batch)) if number in places else batch

        monkeypatch.setattr(TextData, "train_batches", batches)


def no_number(batch):
    return batch | {"weights": np.full_like(batch["weights"], np.nan)}


def strange(batch):
    return batch | {"targets": np.full_like(batch["targets"], 1)}


@pytest.mark.slow
def test_steps_that_are_no_numbers_are_gone_back_before(train, curve, tmp_path, monkeypatch, at_step):
    harmed = Harmed(monkeypatch, no_number, {6, 7, 8})
    options = {"train.rollback.after": 3, "train.rollback.at_most": 1, "train.keep_checkpoints": 9}
    summary = train(tmp_path / "run", **options)
    assert summary["step"] == 12 and "stopped_by" not in summary
    rows = read_metrics(tmp_path / "run")
    back = next(row for row in rows if "rollback" in row)
    assert (back["step"], back["from_step"], back["skipped_rows"], back["rollback"]) == (4, 9, 20, 1)
    assert all(row["loss"] is not None for row in rows if "loss" in row)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    # The fifth step takes the batch that follows the harmful ones.
    assert set(harmed.asked[harmed.asked.index(9) :]) >= set(range(9, 17))
    forgotten = read_metrics(tmp_path / "run", "forgotten.jsonl")
    assert [row["step"] for row in forgotten if "loss" in row][-3:] == [7, 8, 9]
    assert (tmp_path / "run" / "rolled_back_checkpoint_8").is_dir()
    for step in (3, 7, 5):
        at_step(step, lambda: request(signal.SIGTERM))
    for _ in range(4):
        train(tmp_path / "again", **options)
    assert curve(tmp_path / "again") == curve(tmp_path / "run")


@pytest.mark.slow
def test_rollbacks_end_and_the_run_then_stops_with_its_state(train, tmp_path, monkeypatch):
    Harmed(monkeypatch, no_number, range(6, 99))
    options = {"train.rollback.after": 2, "train.rollback.at_most": 2, "train.max_nonfinite": 4}
    with pytest.raises(DivergedError, match="not a number for 4 steps in a row.*newest good checkpoint is"):
        train(tmp_path / "run", **options)
    assert [row["rollback"] for row in read_metrics(tmp_path / "run") if "rollback" in row] == [1, 2]


@pytest.mark.quick_for("rollback")
@pytest.mark.parametrize("action", ["warn", "skip", "rollback"])
def test_a_step_that_stands_out(train, tmp_path, monkeypatch, caplog, action):
    Harmed(monkeypatch, strange, {20})
    options = {
        "train.spike.action": action, "train.spike.window": 8, "train.spike.threshold": 5, "train.rollback.at_most": 1,
        "optimizer.learning_rate": 0.01, "schedule.warmup": 0, "train.checkpoint_every": 2,
        "train.keep_checkpoints": 99, "train.steps": 24, "train.evaluate_every": "null",
    }  # fmt: skip
    assert train(tmp_path / "run", **options)["step"] == 24
    assert "step 21 stands out by" in caplog.text
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if row.get("spike", 0) > 5] == ([] if action == "rollback" else [21])
    back = [(row["step"], row["from_step"]) for row in rows if "rollback" in row]
    assert back == ([(20, 21)] if action == "rollback" else [])
