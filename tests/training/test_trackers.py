"""Trackers never stop a run: offline without a network, and given up when they fail."""

import json
import logging
import os
import subprocess
import sys
import types

import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.spec import OneOf, Spec
from efficient_lm.training.trackers import NoTrackerSpec, TrackerSpec, WandbSpec, _reachable_mode
from efficient_lm.validation import validate

OFFLINE = """
import json, sys
from efficient_lm.training.trackers import WandbSpec
for session in (0, 1):
    tracker = WandbSpec(group="tests", tags=("a",)).start(sys.argv[1], "small", {"train": {"steps": 3}}, session)
    tracker.log({"step": session + 1, "loss": 1.0}, session + 1)
    tracker.finish({"loss": 1.0})
"""


class FakeRun:
    url = "https://tracker.example"

    def __init__(self, calls, failing):
        self.calls, self.failing, self.summary = calls, failing, {}

    def define_metric(self, *arguments, **options):
        self.calls.append(("define_metric", options))

    def log(self, row):
        if self.failing:
            raise ConnectionError("the server is gone\nand more")
        self.calls.append(("log", row))

    def finish(self):
        self.calls.append(("finish", dict(self.summary)))


def fake_wandb(monkeypatch, calls, failing=False):
    def init(**options):
        calls.append(("init", options))
        return FakeRun(calls, failing)

    settings = types.SimpleNamespace(base_url="https://127.0.0.1:9")
    module = types.SimpleNamespace(
        init=init, Settings=lambda **options: settings, api=types.SimpleNamespace(api_key="key")
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def test_none_does_nothing(tmp_path):
    tracker = NoTrackerSpec().start(tmp_path, "name", {})
    tracker.log({"loss": 1.0}, 1)
    tracker.finish({})
    assert os.listdir(tmp_path) == []


def test_rows_and_summary_arrive(tmp_path, monkeypatch):
    calls = []
    fake_wandb(monkeypatch, calls)
    tracker = WandbSpec(mode="online", project="p", tags=("a", "b")).start(tmp_path, "name", {"a": 1})
    tracker.log({"loss": 2.0}, 7)
    tracker.finish({"loss": 1.5})
    options = calls[0][1]
    assert (options["project"], options["tags"], options["mode"], options["dir"]) == (
        "p",
        ["a", "b"],
        "online",
        tmp_path,
    )
    assert calls[1:] == [
        ("define_metric", {"step_metric": "step"}),
        ("log", {"loss": 2.0, "step": 7}),
        ("finish", {"loss": 1.5}),
    ]


def test_every_session_of_a_run_directory_is_one_run(tmp_path, monkeypatch):
    calls = []
    fake_wandb(monkeypatch, calls)
    for _ in range(2):
        WandbSpec(mode="online").start(tmp_path, "name", {})
    ids = [options["id"] for name, options in calls if name == "init"]
    assert len(ids) == 2 and ids[0] == ids[1] and len(ids[0]) == 12


def test_a_failure_is_one_warning(tmp_path, monkeypatch, caplog):
    fake_wandb(monkeypatch, [], failing=True)
    tracker = WandbSpec(mode="online").start(tmp_path, "name", {})
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            tracker.log({"loss": 2.0}, step)
        tracker.finish({})
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["wandb failed and is left out from here on: the server is gone"]


def test_so_is_one_at_the_start(tmp_path, monkeypatch, caplog):
    module = fake_wandb(monkeypatch, [])
    module.init = lambda **options: 1 / 0
    tracker = WandbSpec(mode="online").start(tmp_path, "name", {})
    tracker.log({}, 1)
    tracker.finish({})
    assert len(caplog.records) == 1 and "division by zero" in caplog.text


def test_automatic_mode(monkeypatch):
    module = fake_wandb(monkeypatch, [])
    assert _reachable_mode(module) == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert _reachable_mode(module) == "disabled"


class Holder(Spec):
    tracker: OneOf[TrackerSpec]


def test_faults():
    with pytest.raises(ConfigError, match="tracker.kind: unknown tracker kind 'wanb'; did you mean 'wandb'"):
        validate(Holder, {"tracker": {"kind": "wanb"}})
    with pytest.raises(ConfigError, match="tracker.mode: 'onlin' is not valid; did you mean 'online'"):
        validate(Holder, {"tracker": {"kind": "wandb", "mode": "onlin"}})


def test_offline_under_the_run_directory_and_nowhere_else(tmp_path):
    """The real library, without key and network, in a process of its own: it starts threads and a service."""
    home, run, elsewhere = tmp_path / "home", tmp_path / "run", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"HOME": str(home), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", OFFLINE, str(run)]
    done = subprocess.run(command, env=environment, cwd=elsewhere, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "failed" not in done.stderr, done.stderr
    assert len(list((run / "wandb").glob("offline-run-*/*.wandb"))) == 2
    assert os.listdir(elsewhere) == []
    assert json.dumps(sorted(os.listdir(run))) == '["wandb", "wandb_run_id"]'
