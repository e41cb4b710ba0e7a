"""The moving average of the parameters: its values, and what reads it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.api import load
from efficient_lm.config import load_run_config
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.training.averaging import AverageSpec
from efficient_lm.training.loop import train
from efficient_lm.training.setup import prepare


def test_it_is_that_of_the_formula():
    spec, points = AverageSpec(decay=0.25, start=2), np.random.default_rng(0).standard_normal((7, 3))
    average, wanted = {"w": jnp.zeros(3)}, np.zeros(3)
    for step, point in enumerate(points):
        average = spec.moved(average, {"w": jnp.asarray(point, jnp.float32)}, jnp.int32(step))
        kept = 0.0 if step < 2 else min(0.25, (1 + step - 2) / (10 + step - 2))
        wanted = kept * wanted + (1 - kept) * point
        np.testing.assert_allclose(average["w"], wanted, rtol=1e-5, atol=1e-6)


@pytest.fixture
def config(tmp_path):
    """``config(name, *overrides)`` → a run of four steps on a small text."""
    words = np.random.default_rng(0).choice(["peace", "union", "war", "the", "of"], (40, 60))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": " ".join(row)}) + "\n" for row in words))

    def make(name, *more):
        return load_run_config(
            [
                "model.width=16", "mixer.heads=2", "model.repeats=1", "tokenizer=bytes", "train.batch_size=4",
                "train.sequence_length=32", "train.steps=4", "train.evaluate_every=null", "train.checkpoint_every=2",
                "data=files", f"data.source.paths=[{tmp_path / 'text.jsonl'}]", f"run.dir={tmp_path / name}", *more,
            ]
        )  # fmt: skip

    return make


@pytest.mark.slow
def test_a_run_keeps_it_resumes_it_and_scores_it(tmp_path, config):
    averaged = ("train.average.decay=0.5", "optimizer=schedule_free_adamw", "schedule=constant")
    one = train(config("one", *averaged))
    train(config("two", *averaged, "train.steps=2"))
    two = train(config("two", *averaged))
    assert one["val_loss"] == two["val_loss"]
    plain, mean = load(tmp_path / "one"), load(tmp_path / "one", averaged=True)
    again = load(tmp_path / "two", averaged=True)
    differ = 0
    for leaf, other in zip(jax.tree.leaves(mean.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(leaf, other)
    for leaf, other in zip(jax.tree.leaves(mean.params), jax.tree.leaves(plain.params), strict=True):
        differ += np.any(leaf != other)
    assert differ == len(jax.tree.leaves(mean.params))
    # What validation scored is the average.
    assert mean.evaluate()["loss"] == pytest.approx(one["val_loss"], rel=1e-5)
    assert plain.evaluate()["loss"] != pytest.approx(one["val_loss"], rel=1e-5)


@pytest.mark.slow
def test_it_begins_where_it_is_first_asked_for(tmp_path, config, caplog):
    train(config("run", "train.steps=2"))
    with pytest.raises(CheckpointError, match=r"averaged: .*holds no average .*train\.average"):
        load(tmp_path / "run", averaged=True)
    train(config("run", "train.steps=3", "train.average.decay=0.9"))
    assert "train.average: the checkpoint has none; it begins with the parameters of step 2" in caplog.text
    assert load(tmp_path / "run", averaged=True).step == 3
    # And where it is asked for no more, it is left out.
    train(config("run", "train.steps=4"))
    with pytest.raises(CheckpointError, match="holds no average"):
        load(tmp_path / "run", averaged=True)


def test_it_costs_nothing_where_it_is_off(config):
    assert set(prepare(config("unused")).abstract_state()) == {"parameters", "optimizer", "step", "nonfinite"}


def test_faults(config):
    with pytest.raises(ConfigError, match="train.average.decay: expected a number below 1"):
        config("unused", "train.average.decay=1.0")
    with pytest.raises(ConfigError, match="train.average.decai: .*did you mean 'decay'"):
        config("unused", "train.average.decai=0.9")
