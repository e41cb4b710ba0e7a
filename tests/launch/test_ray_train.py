"""Training by several processes that a Ray of this machine places."""

import json
import os
import re
import subprocess
import sys

import pytest

TINY = [
    "model.width=16", "model.repeats=1", "tokenizer=bytes", "train.steps=4", "train.batch_size=4",
    "train.sequence_length=16", "train.evaluate_rows=4", "train.log_every=1",
]  # fmt: skip


@pytest.fixture
def train(launch_files):
    """``train(*arguments)`` → the script's exit status and all that it printed."""

    def run(*arguments):
        flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
        command = [sys.executable, launch_files / "ray_train.py", "--address", "local", *arguments]
        done = subprocess.run(
            command, env=os.environ | flags, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        return done.returncode, done.stdout

    return run


@pytest.mark.slow
def test_two_processes_train_one_model(train, tmp_path):
    pytest.importorskip("ray")
    status, said = train("--processes", "2", *TINY, f"run.dir={tmp_path / 'run'}")
    assert status == 0 and "4 steps" in said, said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["step"] == 4 and summary["val_loss"] > 0
    assert (tmp_path / "run" / "output.1.log").exists()
    saved = [path.read_bytes() for path in (tmp_path / "run" / "checkpoints" / "4").rglob("*") if path.is_file()]
    assert any(re.search(rb'"processes": ?2', content) for content in saved)


@pytest.mark.slow
def test_a_config_that_is_wrong_starts_nothing(train, tmp_path):
    status, said = train("--processes", "2", *TINY, "train.stepz=4", f"run.dir={tmp_path / 'run'}")
    assert status == 2 and "train.stepz" in said and "did you mean 'steps'" in said
    assert not (tmp_path / "run").exists()
