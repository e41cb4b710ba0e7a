"""A sweep gives the same table wherever its runs are started."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from efficient_lm.sweeps.config import read_sweep
from efficient_lm.sweeps.sweep import run_sweep

PAGE = (Path(__file__).parents[3] / "docs" / "clusters.md").read_text()
SIX = ["loss=3,2,4", "+x=1,2", "steps=4", "launcher.concurrent=2"]
HERE = {
    "submitit": ["launcher=slurm", "launcher.cluster=local", "launcher.gpus=0", "launcher.minutes=10"],
    "ray": ["launcher=ray"],
}


@pytest.fixture
def cluster(request):
    """Keys of a launcher that this machine can try."""
    pytest.importorskip(request.param)
    return HERE[request.param]


@pytest.mark.slow
@pytest.mark.parametrize("cluster", HERE, indirect=True)
def test_stub_runs(cluster, stubbed, table, tmp_path, monkeypatch):
    # What the stub changes is put back.
    for name in ("POLL_SECONDS", "WATCH_SECONDS", "LOOK_SECONDS"):
        monkeypatch.setattr(stubbed.running, name, 0.01)
    found = {}
    for name, keys in {"local": [], "cluster": cluster}.items():
        result = stubbed.sweep([f"dir={tmp_path / name}", "name=six", *SIX, *keys])
        assert [row.state for row in result.rows] == ["finished"] * 6
        found[name] = table(tmp_path / name)
    assert found["local"] == found["cluster"] and len(found["local"]) == 6


TIMES = ("seconds", "tokens_per_second", "mfu", "goodput", "memory", "wait", "stall", "dispatch")
TINY = [
    "model.width=16", "model.repeats=1", "tokenizer=bytes", "train.steps=4", "train.batch_size=2", "train.log_every=2",
    "train.sequence_length=16", "train.evaluate_rows=4", "mixer=attention,gla", "optimizer.learning_rate=1e-3,3e-3,1e-2"
]  # fmt: skip


@pytest.fixture(scope="module")
def trained_here(tmp_path_factory):
    return _trained(tmp_path_factory.mktemp("local"), [])


@pytest.mark.slow
@pytest.mark.parametrize("cluster", HERE, indirect=True)
def test_trained_models(cluster, trained_here, tmp_path):
    assert _trained(tmp_path, cluster) == trained_here


def _trained(folder, keys):
    """Rows of a sweep over six tiny models, without what took time."""
    overrides = [f"dir={folder / 'sweep'}", "name=six", "launcher.concurrent=2", *TINY, *keys]
    result = run_sweep(*read_sweep(overrides, ()))
    assert [row.state for row in result.rows] == ["finished"] * 6, [row.reason for row in result.rows]
    rows = json.loads((folder / "sweep" / "table.json").read_text())["rows"]
    for row in rows:
        row["figures"] = {
            name: value for name, value in row["figures"].items() if not any(word in name for word in TIMES)
        }
        assert {"val_loss", "parameters"} <= set(row["figures"])
    return rows


@pytest.mark.parametrize("command", re.findall(r"^efficient-lm sweep (.*?[^\\])$", PAGE, re.MULTILINE | re.DOTALL))
def test_commands_of_the_page_are_understood(command):
    config, axes = read_sweep(shlex.split(command.replace("\\\n", " ")), ())
    assert config.launcher.kind in ("slurm", "ray") and axes


def test_packages_of_clusters_are_imported_only_where_they_are_needed():
    code = "import sys, efficient_lm.sweeps.launchers; sys.exit(bool({'ray', 'submitit', 'jax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
