"""Whole runs on a small text: resuming to the bit, killing, refusing, diverging, full disks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from efficient_lm.api import load
from efficient_lm.config import load_run_config
from efficient_lm.data.dataset import TextData
from efficient_lm.errors import CheckpointError, ConfigError, DivergedError, ResourceError
from efficient_lm.training import loop
from efficient_lm.training.reporting import read_metrics
from efficient_lm.training.run_directory import RunDirectory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    words = ["peace", "union", "congress", "the", "of", "a", "people", "war", "commerce", "treaty"]
    rng = np.random.default_rng(0)
    documents = [" ".join(rng.choice(words, 60)) for _ in range(40)]
    path = folder / "speeches.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def overrides(text, folder, **options):
    base = {
        "tokenizer": "bytes", "data": "files", "data.source.paths": f"[{text}]", "run.name": "test", "run.dir": folder,
        "model.width": 16, "model.repeats": 2, "mixer.heads": 2, "train.steps": 12, "train.batch_size": 4,
        "train.sequence_length": 32, "train.log_every": 1, "train.evaluate_every": 6, "train.checkpoint_every": 4,
        "train.evaluate_rows": 4,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in {**base, **options}.items()]


def run(text, folder, **options):
    return loop.train(load_run_config(overrides(text, folder, **options)))


def saved_state(folder, step=12):
    items = ocp.load_checkpointables(folder / "checkpoints" / str(step))
    return jax.tree.leaves({name: items[name] for name in ("parameters", "optimizer")})


def losses(folder):
    return [(row["step"], row["loss"]) for row in read_metrics(folder) if "loss" in row]


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run in one go."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run(text, folder)


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def test_an_evaluation_takes_as_many_rows_at_a_time_as_a_step(text, tmp_path, monkeypatch):
    """What has the memory for the step has it for the evaluation."""
    asked, batches = [], TextData.validation_batches
    monkeypatch.setattr(
        TextData, "validation_batches", lambda self, rows, *rest: asked.append(rows) or batches(self, rows, *rest)
    )
    summary = run(text, tmp_path / "run", **{"train.steps": 1, "train.accumulate": 2, "train.evaluate_every": "null"})
    assert asked == [2] and summary["val_loss"] > 0


def test_a_run_directory_is_complete(whole):
    folder, summary = whole
    names = {entry.name for entry in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "plots", "checkpoints", "tokenizer"} <= names
    assert (folder / "plots" / "loss.png").stat().st_size > 10_000
    assert [step for step, _ in losses(folder)] == list(range(1, 13))
    rows = read_metrics(folder)
    assert {"step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second", "step_seconds", "data_wait",
            "dispatch", "metrics_wait", "compile_seconds", "host_memory_bytes"} <= set(rows[0])  # fmt: skip
    assert "mfu" not in rows[0] and "compile_seconds" not in rows[2]
    assert all(0 <= rows[2][share] < 1 for share in ("data_wait", "dispatch", "metrics_wait"))
    assert [row["step"] for row in rows if "val_bits_per_byte" in row] == [6, 12]
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["tokens"] == rows[-1]["tokens"] and summary["step"] == 12
    assert losses(folder)[-1][1] < losses(folder)[0][1]


class StopAfter:
    """Stands in for a signal that arrives during a step."""

    def __init__(self, steps):
        self.left, self.number = steps, signal.SIGTERM

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    @property
    def signal(self):
        self.left -= 1
        return self.number if self.left < 0 else 0


def test_stopping_and_going_on_is_the_same_to_the_bit(text, whole, tmp_path, monkeypatch):
    folder = tmp_path / "stopped"
    monkeypatch.setattr(loop, "Interruption", lambda: StopAfter(6))
    summary = run(text, folder)
    assert summary["stopped_by"] == "SIGTERM" and summary["step"] == 6
    monkeypatch.undo()
    assert run(text, folder)["step"] == 12
    assert same(saved_state(folder), saved_state(whole[0]))
    assert losses(folder) == losses(whole[0])
    assert [row["tokens"] for row in read_metrics(folder)] == [row["tokens"] for row in read_metrics(whole[0])]


def test_a_finished_run_does_nothing_more(text, whole):
    before = losses(whole[0])
    assert run(text, whole[0])["step"] == 12
    assert losses(whole[0]) == before


@pytest.fixture
def start():
    """``start(arguments)`` → the process of `efficient-lm train`, which does not outlive the test."""
    started = []

    def process(arguments):
        command = [sys.executable, "-m", "efficient_lm", "train", *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield process
    for each in started:
        with each:
            each.kill()


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def test_killed_at_any_moment_it_goes_on_from_the_newest_whole_checkpoint(text, whole, tmp_path, start):
    folder = tmp_path / "killed"
    for marker in ("checkpoints/4", "checkpoints/8"):
        process = start(overrides(text, folder))
        wait_for(lambda marker=marker: (folder / marker).is_dir(), process)
        process.kill()
        process.communicate()
        assert not (folder / "summary.json").exists()
    summary = run(text, folder)
    assert summary["step"] == 12
    assert same(saved_state(folder), saved_state(whole[0]))
    assert losses(folder) == losses(whole[0])
    spent = summary["goodput"]
    assert spent["sessions"] == 3 and spent["down_seconds"] > 0 and 0 < spent["goodput"] < 1
    parts = [value for name, value in spent.items() if name.endswith("_seconds") and name != "wall_seconds"]
    assert sum(parts) == pytest.approx(spent["wall_seconds"])


def test_a_signal_saves_and_stops(text, tmp_path, start):
    folder = tmp_path / "signalled"
    process = start(overrides(text, folder, **{"train.steps": 100_000, "train.checkpoint_every": 100_000}))
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(losses(folder)) > 3, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    step = json.loads((folder / "summary.json").read_text())["step"]
    assert f"the same command goes on from step {step}" in output
    assert [path.name for path in (folder / "checkpoints").iterdir() if path.is_dir()] == [str(step)]


def test_a_second_run_in_the_same_place_is_refused(text, whole):
    with RunDirectory(whole[0]), pytest.raises(CheckpointError, match=r"run\.dir: .* is in use by another run"):
        run(text, whole[0])


def test_a_damaged_checkpoint_is_named_and_passed_over(text, whole, tmp_path, caplog):
    folder = tmp_path / "damaged"
    shutil.copytree(whole[0], folder)
    for file in (folder / "checkpoints" / "12" / "parameters").rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            os.truncate(file, file.stat().st_size // 2)
    summary = run(text, folder, **{"train.steps": 12})
    assert summary["step"] == 12 and "checkpoints/12 is damaged" in caplog.text
    assert "from step 8" in caplog.text
    assert same(saved_state(folder), saved_state(whole[0]))


def test_another_architecture_is_refused_and_nothing_is_lost(text, whole):
    before = sorted(path.name for path in whole[0].rglob("*"))
    with pytest.raises(
        CheckpointError, match=r"another architecture \(model.width: 16 → 32\); choose another run.name"
    ):
        run(text, whole[0], **{"model.width": 32})
    assert sorted(path.name for path in whole[0].rglob("*")) == before


def test_loading_a_checkpoint_of_another_architecture(text, whole, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(whole[0], folder)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("width: 16", "width: 32"))
    with pytest.raises(CheckpointError, match=r"another architecture: 'embedding.tokens' is float32\[257, 16\]"):
        load(folder)


def test_a_longer_run_goes_on(text, whole, tmp_path):
    folder = tmp_path / "longer"
    shutil.copytree(whole[0], folder)
    assert run(text, folder, **{"train.steps": 16})["step"] == 16
    assert losses(folder)[:12] == losses(whole[0])


@pytest.mark.slow
def test_another_implementation_of_an_operator_is_the_same_model(text, whole, tmp_path):
    folder = tmp_path / "reference"
    shutil.copytree(whole[0], folder)
    assert run(text, folder, **{"train.steps": 14, "mixer.implementation": "reference"})["step"] == 14


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_state(text, tmp_path):
    folder = tmp_path / "diverged"
    options = {"optimizer.learning_rate": 1e30, "train.clip_norm": "null", "train.max_nonfinite": 5, "train.steps": 60,
               "schedule": "constant", "schedule.warmup": 0}  # fmt: skip
    with pytest.raises(DivergedError, match="not a number for 5 steps in a row") as error:
        run(text, folder, **options)
    assert error.value.status == 5
    rows = read_metrics(folder)
    assert rows[-1]["nonfinite_steps"] == 5 and any(row["loss"] is None for row in rows)
    leaves = saved_state(folder, rows[-1]["step"])
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves)


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(text, tmp_path, monkeypatch):
    folder = tmp_path / "full"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: usage._replace(free=1000 if (folder / "checkpoints/4").is_dir() else usage.free),
    )
    with pytest.raises(ResourceError, match="are free; the newest good checkpoint is 4") as error:
        run(text, folder)
    assert error.value.status == 6
    monkeypatch.undo()
    assert run(text, folder)["step"] == 12


def test_nothing_is_written_for_a_faulty_config(text, tmp_path):
    for options in ({"train.batch_size": 3, "train.accumulate": 2}, {"model.vocab_size": 100},
                    {"model.learned_positions": 8}, {"mixer.heads": 3}):  # fmt: skip
        with pytest.raises(ConfigError):
            run(text, tmp_path / "never", **options)
    assert not (tmp_path / "never").exists()


def test_a_smaller_vocabulary_than_the_tokenizers_is_refused(text, tmp_path):
    with pytest.raises(ConfigError, match=r"model.vocab_size: 100 is smaller than the tokenizer's 257"):
        run(text, tmp_path / "never", **{"model.vocab_size": 100})


def test_wall_time_can_be_limited(text, tmp_path):
    summary = run(text, tmp_path / "short", **{"train.minutes": 1e-4, "train.steps": 1000})
    assert summary["stopped_by"] == "train.minutes" and summary["step"] < 1000
    before_any_row = run(text, tmp_path / "none", **{"train.minutes": 1e-9})
    assert before_any_row["step"] == 0 and (tmp_path / "none" / "summary.json").is_file()


def test_the_python_interface(whole, tmp_path):
    model = load(whole[0])
    assert model.step == 12
    ids = np.array([[1, 2, 3, 4]])
    logits = model.logits(ids)
    assert logits.shape == (1, 4, 257) and logits.dtype == np.float32
    picked = jax.nn.log_softmax(logits[0, :-1])[np.arange(3), ids[0, 1:]]
    assert model.loss(ids) == pytest.approx(-float(picked.mean()), rel=1e-5)
    copy = load(model.save(tmp_path / "copy"))
    np.testing.assert_array_equal(copy.logits(ids), logits)
    with pytest.raises(CheckpointError, match="already holds something"):
        model.save(tmp_path / "copy")
    early = load(whole[0] / "checkpoints" / "8")
    assert early.step == 8 and not np.array_equal(early.logits(ids), logits)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; there are 4, 8, 12"):
        load(whole[0] / "checkpoints" / "7")


def test_a_missing_run_names_its_neighbours(whole):
    with pytest.raises(CheckpointError, match=r"whol: neither a run directory .*there are .*whole"):
        load(whole[0].parent / "whol")


def test_evaluation_equals_the_runs_own(whole):
    scores = load(whole[0]).evaluate()
    assert scores["bits_per_byte"] == pytest.approx(whole[1]["val_bits_per_byte"], rel=1e-6)


def test_evaluation_of_a_file_by_hand(whole, tmp_path):
    path = Path(tmp_path / "note.md")
    path.write_text("the people of a union")
    model = load(whole[0])
    scores = model.evaluate([str(path)], sequence_length=64, batch_size=2)
    ids = np.concatenate([[256], model.tokenizer.encode(path.read_text()), [256]])[None]
    nats = model.loss(ids) * (ids.size - 1)
    assert scores["tokens"] == 22 and scores["bytes"] == 21
    assert scores["bits_per_byte"] == pytest.approx(nats / np.log(2) / 21, rel=1e-5)


@pytest.mark.slow
def test_evaluations_look_inside_the_mixers_when_asked(text, tmp_path):
    options = {"mixer": "rg_lru", "mixer.heads": 4, "train.steps": 2, "train.evaluate_every": 1}
    run(text, tmp_path / "run", **{"train.diagnostics": "true", **options})
    rows = [row for row in read_metrics(tmp_path / "run") if "val_loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert 0 < row["decay/layer_1"] < 1 and 0 < row["state_norm/layer_0"] <= row["state_maximum/layer_0"]
