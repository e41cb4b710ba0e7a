"""The verb `sweep`: what it refuses before anything runs, and a real one."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from efficient_lm.errors import UserError
from efficient_lm.sweeps import sweep
from efficient_lm.sweeps.checking import check


class InThisProcess:
    """Checks candidates here: the tests have jax anyway."""

    def check(self, questions):
        for question in questions:
            try:
                yield check(question)
            except UserError as error:
                yield error

    def rest(self):
        pass

    close = rest


@pytest.fixture
def refused(run, on_numbers, tmp_path, monkeypatch):
    """``refused(*overrides)`` → the fault of a sweep that wrote nothing."""
    monkeypatch.setattr(sweep, "Checker", InThisProcess)
    monkeypatch.chdir(tmp_path)

    def say(*overrides):
        status, out, err = run("sweep", *on_numbers, *overrides)
        assert (status, out) == (2, "") and err.startswith("error: ") and os.listdir(tmp_path) == []
        return err.removeprefix("error: ").strip()

    return say


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["mixr=attention,gla"], "mixr: unknown key; did you mean 'mixer'"),
        (["mixer=attention,glaa"], "glaa: mixer=glaa: no such config; did you mean 'gla'"),
        (["mixer=attention,"], "mixer=attention,: an empty choice"),
        (["axes={mixer: []}"], "axes.mixer: an empty choice"),
        (["model=mamba2_tiny,uniform", "mixer=attention,gla"], "nothing reads it: model=mamba2_tiny names the "),
        (["optimizer.learning_rate=1e-3,hello"], "learning_rate_hello: optimizer.learning_rate: expected a number"),
        (["model.width=16,17"], "width_17: "),
        (["mixer=attention,gla", "metric=val_accuracy"], "metric: runs of such data have no 'val_accuracy'"),
        (
            ["mixer=attention,gla", "search.pruner=median", "train.evaluate_every=null"],
            "train.evaluate_every says when",
        ),
        (["mixer=attention,gla", "seeds=0"], "seeds: "),
        ([], "nothing differs"),
    ],
)
def test_what_is_refused_before_anything_runs(refused, overrides, said):
    assert said in refused(*overrides)


def test_a_dry_run_prints_what_would_run(run, on_numbers, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "Checker", InThisProcess)
    monkeypatch.chdir(tmp_path)
    status, out, err = run("sweep", *on_numbers, "mixer=attention,gla", "seeds=3", "dry_run=true")
    assert (status, err) == (0, "") and os.listdir(tmp_path) == []
    assert "2 arms × 3 seeds → runs/sweeps/mixer" in out and "parameters" in out and "memory" in out


def test_the_composed_sweep_is_printed(run):
    status, out, _ = run("sweep", "sweep=tiny", "ffn=mlp", "--cfg", "job")
    printed = yaml.safe_load(out)
    assert status == 0 and printed["axes"] == {"mixer": ["attention", "gla"]} and "ffn=mlp" in printed["base"]


@pytest.mark.slow
def test_a_real_sweep_is_killed_and_goes_on(on_numbers, cache, tmp_path):
    """Two mixers; the sweep is killed in the middle of a run, a run is killed too, and the table is as without."""
    keys = [*on_numbers, "mixer=attention,gla", "train.steps=12", "train.checkpoint_every=2", "train.evaluate_every=4"]
    command = [sys.executable, "-m", "efficient_lm", "sweep", *keys, "name=real"]
    environment = os.environ | {"EFFICIENT_LM_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def start(folder):
        log = open(tmp_path / "log", "ab")
        return subprocess.Popen([*command, f"dir={folder}"], env=environment, stdout=log, stderr=log)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(600) == 0, (tmp_path / "log").read_text()
    process = start(killed)
    while not list(killed.glob("runs/*/checkpoints/2")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(killed).wait(600) == 0, (tmp_path / "log").read_text()

    def rows(folder):
        found = json.loads((folder / "table.json").read_text())["rows"]
        return [
            row | {"figures": {key: row["figures"][key] for key in ("step", "val_loss", "parameters")}} for row in found
        ]

    assert rows(killed) == rows(whole) and [row["state"] for row in rows(whole)] == ["finished"] * 2
