"""Carries out docs/adding_a_block.md in a copy of the project."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding_a_block.md").read_text()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    unwanted = shutil.ignore_patterns("__pycache__")
    for part in ("efficient_lm", "kernels_pallas", "configs"):
        shutil.copytree(ROOT / part, folder / part, ignore=unwanted)
    (folder / "tests" / "models").mkdir(parents=True)
    for test in ("conftest.py", "models/conftest.py", "models/test_mixers.py"):
        shutil.copy(ROOT / "tests" / test, folder / "tests" / test)
    files = re.findall(r"^`([\w/.]+)`\n\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for path, content in files:
        assert not (folder / path).exists()
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    assert [Path(path).suffix for path, _ in files] == [".py", ".yaml", ".py"]
    return folder


def in_copy(project, command):
    words = shlex.split(command)
    program = {"python": [sys.executable], "efficient-lm": [sys.executable, "-m", "efficient_lm"]}[words[0]]
    small = ["model.width=16", "model.repeats=2", "train.batch_size=2", "train.sequence_length=16", "tokenizer=bytes"]
    extra = small if words[0] == "efficient-lm" else ["-p", "no:cacheprovider", "-n", "0"]
    limit = ["train.evaluate_rows=2", "data=files", "data.source.paths=[note.txt]"] if "train" in words else []
    (project / "note.txt").write_text("we hold these truths " * 40)
    environment = {**os.environ, "PYTHONPATH": str(project)}
    return subprocess.run(
        [*program, *words[1:], *extra, *limit],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


COMMANDS = re.search(r"```sh\n(.*?)```", PAGE, re.DOTALL)[1].strip().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[:2]))
def test_every_command_of_the_page_works(project, command):
    done = in_copy(project, command)
    assert done.returncode == 0, done.stdout + done.stderr
    if "train" in command:
        assert (project / "runs" / "shifted" / "summary.json").is_file()


def test_the_mistyped_kind_is_answered_with_its_name(project):
    done = in_copy(project, "efficient-lm plan experiment=quickstart mixer=token_shfit")
    assert done.returncode == 2 and "did you mean 'token_shift'" in done.stderr
