"""Launch files, and a folder of commands that stand in for those of a cluster."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

FILES = Path(__file__).parents[2] / "scripts" / "launch"


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """``commands(name=line)``: programs of the shell, in the folder that it returns, which is first on the path."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def make(**lines):
        for name, line in lines.items():
            path = folder / name.replace("_", "-")
            path.write_text(f'#!/bin/bash\necho "{path.name} $*" >> {tmp_path / "calls"}\n{line}\n')
            path.chmod(stat.S_IRWXU)
        return folder

    return make


@pytest.fixture
def calls(tmp_path):
    """``calls()``: commands that were given so far, in order."""
    return lambda: (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []


@pytest.fixture
def launched(tmp_path):
    """``launched(file, *arguments, **variables)``: a launch file that runs in bash."""
    running = []

    def launch(file, *arguments, **variables):
        process = subprocess.Popen(
            ["bash", FILES / file, *arguments], cwd=tmp_path, env=os.environ | variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        running.append(process)
        return process

    yield launch
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def launch_files():
    """The folder."""
    return FILES
