"""What LayerSkip's training is for: a model that has learned to lose layers is better where it leaves early."""

import pytest

from efficient_lm.api import load
from efficient_lm.cli import main as cli

RUN = ["tokenizer=bytes", "model.width=32", "model.repeats=6", "mixer.heads=2", "optimizer.learning_rate=6e-3"]
RUN += ["train.steps=120", "train.batch_size=16", "train.sequence_length=48", "train.evaluate_rows=4", "run.name=short"]


@pytest.mark.slow
def test_a_model_trained_with_layer_skip_leaves_early_with_less_loss(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "keep_compiled_programs", lambda: None)
    scores = {}
    for name, options in {
        "plain": [],
        "layer_skip": ["depth=layer_drop", "depth.rate=0.3", "model.exits={every: 2}"],
    }.items():
        assert cli.main(["train", *RUN, *options, f"run.dir={tmp_path / name}"]) == 0
        model = load(tmp_path / name)
        early = model.skip("confidence", layers=[2], threshold=0.0)
        scores[name] = [each.evaluate(limit=60)["bits_per_byte"] for each in (model, early)]
    # Without it the head makes little of the second layer's stream; with it, at hardly any cost behind the last.
    assert scores["layer_skip"][1] < scores["plain"][1] - 0.3
    assert scores["layer_skip"][0] < scores["plain"][0] + 0.3
