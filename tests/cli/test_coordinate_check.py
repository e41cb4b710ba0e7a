"""The coordinate check from the command line, and what becomes of a model that was trained with muP."""

import json

import numpy as np
import pytest

from efficient_lm.api import load
from efficient_lm.errors import ConfigError

CHECK = ["widths=[32,256]", "mixer.head_size=8", "optimizer.learning_rate=1e-2"]
MUP = ["parameterization=mup", "parameterization.base_width=8"]


def small(on_numbers, *more):
    return [key for key in on_numbers if not key.startswith(("model.width", "mixer.heads", "ffn.hidden"))] + [*more]


def checked(run, on_numbers, folder, *keys):
    status, printed, said = run("coordinate_check", *small(on_numbers, *CHECK, *keys, f"output={folder}"))
    assert said == ""
    assert (folder / "coordinates.png").stat().st_size > 10_000
    found = json.loads((folder / "coordinates.json").read_text())
    assert found["widths"] == [32, 256] and found["stays"] == (status == 0)
    return status, printed, found


@pytest.mark.slow
def test_activations_stay_of_one_size_with_mup_and_muon(run, on_numbers, tmp_path):
    assert checked(run, on_numbers, tmp_path / "mup", *MUP, "optimizer=muon")[0] == 0
    assert checked(run, on_numbers, tmp_path / "standard", "optimizer=muon")[0] == 1


@pytest.mark.slow
def test_activations_stay_of_one_size_with_mup_and_grow_without(run, on_numbers, tmp_path):
    status, printed, found = checked(run, on_numbers, tmp_path / "mup", *MUP)
    assert status == 0 and "what training changes stays of one size" in printed
    names = ["embedding", "layer 0", "layer 1", "logits"]
    change, size = found["slopes"]["change"], found["slopes"]["size"]
    assert list(change) == names and all(slope < 0.3 for name in names for slope in change[name][1:])
    assert all(change[name][-1] > -0.3 for name in names[:-1])
    assert all(slope < 0.3 for name in names for slope in size[name])
    assert change["logits"][0] is None and len(change["logits"]) == 4

    status, printed, found = checked(run, on_numbers, tmp_path / "standard")
    assert status == 1 and "grows with the width: " in printed
    assert all(found["slopes"]["change"][name][-1] > 0.8 for name in ("layer 0", "layer 1"))
    assert found["growing"].keys() >= {"layer 0", "layer 1"}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["widths=[64]"], "widths: expected at least 2 items"),
        (["model.width=64"], "model.width: is each of widths=[...] in turn; leave it out"),
        (["mixer.heads=3", "widths=[48,64]"], "3 heads do not divide width 64"),
        (["step=2"], "step: "),
    ],
)
def test_misuses(run, keys, said):
    status, _, error = run("coordinate_check", *keys)
    assert status == 2 and said in error


@pytest.fixture(scope="module")
def trained(on_numbers, tmp_path_factory):
    from efficient_lm.config import load_run_config
    from efficient_lm.training.loop import train

    folder = tmp_path_factory.mktemp("runs") / "mup"
    keys = [*on_numbers, *MUP, "optimizer.learning_rate=1e-2", f"run.dir={folder}"]
    train(load_run_config(keys))
    return folder, keys


@pytest.mark.slow
def test_a_model_trained_with_mup_keeps_its_function(run, trained, tmp_path):
    """Loaded, saved, resumed, begun with and cut: its factors are its own, and applied once."""
    folder, keys = trained
    model, ids = load(folder), np.arange(24).reshape(2, 12)
    spec = model.model.spec
    assert spec.logit_multiplier == 0.5 and spec.blocks["layer"].mixer.scale == 4**-0.5 / 2
    logits = model.logits(ids)
    model.save(tmp_path / "copy")
    np.testing.assert_array_equal(load(tmp_path / "copy").logits(ids), logits)
    assert run("train", *keys)[0] == 0
    np.testing.assert_array_equal(load(folder).logits(ids), logits)
    part = model.extract(ffn=0.5)
    assert part.model.spec.logit_multiplier == 0.5 and part.config.parameterization.kind == "standard"
    with pytest.raises(ConfigError, match="logit_multiplier"):
        model.to_hf(tmp_path / "hf")


@pytest.mark.slow
def test_training_that_begins_with_it_has_its_factors_once(run, trained, on_numbers, tmp_path):
    folder, _ = trained
    short = [key for key in on_numbers if key.startswith(("train.", "data"))]
    begin = [f"init_from={folder}", f"run.dir={tmp_path / 'next'}", "optimizer.learning_rate=1e-30"]
    assert run("train", *short, *MUP, *begin)[0] == 0
    ids = np.arange(12)[None]
    np.testing.assert_allclose(load(tmp_path / "next").logits(ids), load(folder).logits(ids), atol=1e-6)
