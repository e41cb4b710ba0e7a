"""What an installation is made from."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def locked() -> dict[str, str]:
    """Package → its entry."""
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text().strip())
    return {re.match(r"[A-Za-z0-9._-]+", entry).group().lower().replace("_", "-"): entry for entry in entries}


def test_every_locked_package_has_a_version_and_hashes():
    for name, entry in locked().items():
        assert re.match(rf"{name}==\S+ ", entry), name
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), name


def test_the_lock_names_no_address():
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text and "index" not in text and " @ " not in text


def test_the_lock_has_what_the_package_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.match(r"[A-Za-z0-9-]+", requirement).group() for requirement in wanted}
    assert names <= set(locked())
    assert locked()["jax"].startswith("jax==0.11.2 ")


def test_the_package_says_what_the_files_say():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"efficient-lm": "efficient_lm.cli.main:main"}
    assert project["license"] == "Apache-2.0" and "Apache License" in (ROOT / "LICENSE").read_text()
    assert (ROOT / ".python-version").read_text().strip() in project["requires-python"]
