"""Sweeps of stub runs: in this process, and in processes that can be killed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def stubbed():
    """The module that runs sweeps of stub runs."""
    spec = importlib.util.spec_from_file_location("sweep_nursery", HERE / "nursery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sweep(stubbed, tmp_path, monkeypatch):
    """``sweep(*overrides)`` → the result of a sweep of stub runs in `tmp_path/sweep`."""
    for name, seconds in (("POLL_SECONDS", 0.01), ("WATCH_SECONDS", 0.01), ("LOOK_SECONDS", 0.1)):
        monkeypatch.setattr(stubbed.running, name, seconds)
    return lambda *overrides: stubbed.sweep([f"dir={tmp_path / 'sweep'}", *overrides])


class Nursery:
    """Processes that run sweeps."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, HERE / "nursery.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def start(self, log, *overrides):
        """Start one; its number."""
        return int(self._asked(json.dumps({"log": str(log), "overrides": list(overrides)})))

    def wait(self, pid):
        """Its exit status."""
        return int(self._asked(f"wait {pid}"))

    def close(self):
        self._process.stdin.close()
        self._process.wait()

    def _asked(self, line):
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


@pytest.fixture(scope="session")
def nursery():
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def table():
    """``table(folder)`` → the rows of `table.json`."""
    return lambda folder: json.loads((folder / "table.json").read_text())["rows"]
