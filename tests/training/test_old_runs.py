"""A run directory of an earlier version goes on where it stopped, and can be used."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from efficient_lm.api import load
from efficient_lm.config import read_config
from efficient_lm.training.loop import train
from efficient_lm.training.reporting import read_metrics

OLD = Path(__file__).parent.parent / "goldens" / "old_run"


def rows_of(folder):
    return [(row["step"], row["tokens"], row["loss"]) for row in read_metrics(folder) if "loss" in row]


def test_an_old_run_goes_on(tmp_path, monkeypatch):
    """From its checkpoint of step 4 it comes to the losses and the parameters that it had at step 8."""
    monkeypatch.chdir(OLD.parents[2])
    folder = tmp_path / "run"
    shutil.copytree(OLD, folder)
    shutil.rmtree(folder / "checkpoints" / "8")
    config = read_config(folder / "config.yaml")
    assert train(config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder)})}))["step"] == 8
    # Another processor adds sums in another order: float32 rounding.
    np.testing.assert_allclose(rows_of(folder), rows_of(OLD), rtol=1e-5)
    assert len(rows_of(folder)) == 8
    ids = np.arange(12).reshape(1, 12)
    np.testing.assert_allclose(load(folder).logits(ids), load(OLD).logits(ids), atol=1e-5)


@pytest.mark.parametrize("place", ["", "checkpoints/4"])
def test_an_old_run_can_be_used(place):
    model = load(OLD / place)
    assert model.step == (4 if place else 8)
    assert np.isfinite(model.logits(np.arange(12).reshape(1, 12))).all()
