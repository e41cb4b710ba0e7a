"""Probes say what the arrays say, by layer, and change nothing; a trace of some steps is written."""

import gzip
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import load_run_config, read_config, save_config
from efficient_lm.errors import ConfigError
from efficient_lm.objectives.base import context_of
from efficient_lm.training import loop
from efficient_lm.training.probes import PROBES_FILE, make_probe, probe_row
from efficient_lm.training.profile import Profile
from efficient_lm.training.reporting import read_metrics
from efficient_lm.training.setup import prepare
from efficient_lm.training.step import initial_state

SMALL = [
    "tokenizer=bytes", "model.width=16", "model.repeats=2", "mixer.heads=2", "train.steps=6", "train.batch_size=4",
    "train.sequence_length=32", "train.log_every=1", "train.evaluate_every=null", "train.checkpoint_every=3",
    "data=files", "tokenizer=bytes",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = np.random.default_rng(0).choice(["peace", "union", "war", "of", "treaty"], (40, 60))
    path.write_text("".join(json.dumps({"text": " ".join(row)}) + "\n" for row in words))
    return path


def config(text, folder, *overrides):
    keys = [*SMALL, f"data.source.paths=[{text}]", f"run.dir={folder}", *overrides]
    return load_run_config(keys)


@pytest.fixture(scope="module")
def setup(text, tmp_path_factory):
    return prepare(config(text, tmp_path_factory.mktemp("runs"), "train.clip_norm=0.1"))


def test_sizes_are_those_of_the_arrays(setup, drawn):
    """Against the step itself: what it changed the parameters by, and gradients taken by hand."""
    model = setup.model
    state = initial_state(drawn(model, moved=0.1), setup.optimizer)
    state["step"] += 1  # The first has no learning rate.
    batch = next(setup.portions.batches(setup.data, 0))
    batch = setup.layout.batch({name: values for name, values in batch.items() if name != "target_bytes"})

    def mean_loss(params):
        sums = setup.config.objective.sums(model, params, batch, jnp.float32)
        return sums.loss / sums.weight, model.hidden(params, batch["tokens"])[0]

    grads, _ = jax.jit(jax.grad(mean_loss, has_aux=True))(state["parameters"])
    row = probe_row(model, setup.probe(state, batch))
    after, metrics = jax.jit(setup.plain_step())(state, batch)
    assert float(metrics["grad_norm"]) > 0.1  # Clipped, and the sizes are of what was there before.
    squares = [value**2 for name, value in row.items() if name.startswith("grad_norm/")]
    assert np.sqrt(sum(squares)) == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)

    def pick(tree):
        return np.asarray(tree["stack"]["segment_0"]["layer_0"]["ffn"]["inner"]["down"]["weight"])[1]

    before, grad, change = pick(state["parameters"]), pick(grads), pick(after["parameters"]) - pick(state["parameters"])
    name = "layer_1.ffn.inner.down.weight"
    expected = {
        "grad_norm": np.linalg.norm(grad), "grad_rms": np.sqrt(np.mean(grad**2)), "grad_max": np.abs(grad).max(),
        "weight_norm": np.linalg.norm(before), "weight_rms": np.sqrt(np.mean(before**2)),
        "weight_max": np.abs(before).max(), "update_ratio": np.linalg.norm(change) / np.linalg.norm(before),
    }  # fmt: skip
    # Other programs round sums otherwise; the change is a difference of float32 values, hence less exact.
    for figure, value in expected.items():
        assert row[f"{figure}/{name}"] == pytest.approx(float(value), rel=1e-3 if figure == "update_ratio" else 1e-5)
    assert row["weight_rms/embedding.tokens"] > 0 and "grad_norm/head.weight" in row


def test_activations_are_those_behind_each_layer(setup, drawn):
    model, params = setup.model, drawn(setup.model, moved=0.1)
    batch = {name: np.ones((2, 8), np.int32) for name in ("tokens", "segment_ids")}
    batch["positions"] = np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8))
    batch["segment_ids"][1, 5:] = 0
    probe = make_probe(lambda state, batch: ({}, {"seen": {}}), model, jnp.float32)
    _, found = jax.jit(probe)({"parameters": params}, batch)
    live = batch["segment_ids"] != 0
    x, context, _ = model.entered(params, batch["tokens"], context_of(batch))
    before = np.asarray(x)
    for number in range(2):
        values = jax.tree.map(lambda leaf, number=number: leaf[number], params["stack"]["segment_0"]["layer_0"])
        after = np.asarray(model.stack.periods[0][0](values)(jnp.asarray(before), context)[0])
        assert found["stream_rms"][number] == pytest.approx(np.sqrt(np.mean(after[live] ** 2)), rel=1e-5)
        assert found["stream_max"][number] == pytest.approx(np.abs(after[live]).max(), rel=1e-5)
        assert found["added_rms"][number] == pytest.approx(np.sqrt(np.mean((after - before)[live] ** 2)), rel=1e-4)
        before = after


def losses(folder):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(folder) if "loss" in row]


@pytest.mark.slow
def test_a_run_with_probes_and_a_trace_has_the_same_bits(text, tmp_path, caplog):
    plain = loop.train(config(text, tmp_path / "plain"))
    options = ["train.probes.every=2", "train.profile=2:4", "tracker=tensorboard"]
    watched = loop.train(config(text, tmp_path / "watched", *options))
    assert losses(tmp_path / "watched") == losses(tmp_path / "plain")
    assert watched["val_loss"] == plain["val_loss"] and not (tmp_path / "plain" / PROBES_FILE).exists()
    rows = read_metrics(tmp_path / "watched", PROBES_FILE)
    assert [row["step"] for row in rows] == [2, 4, 6]
    of_rows = {row["step"]: row["grad_norm"] for row in read_metrics(tmp_path / "watched") if "loss" in row}
    for row in rows:
        squares = [value**2 for name, value in row.items() if name.startswith("grad_norm/")]
        assert np.sqrt(sum(squares)) == pytest.approx(of_rows[row["step"]], rel=1e-5)
    names = [event["name"] for event in trace(tmp_path / "watched") if event.get("name") == "train"]
    steps = {event["args"]["step_num"] for event in trace(tmp_path / "watched") if event.get("name") == "train"}
    assert len(names) == 2 and steps == {"2", "3"}
    assert "open it with `xprof --logdir" in caplog.text


def trace(folder):
    files = list((folder / "profile").rglob("*.trace.json.gz"))
    assert len(files) == 1
    return json.loads(gzip.decompress(files[0].read_bytes()))["traceEvents"]


def test_a_span_is_traced_by_the_session_that_comes_to_it(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *arguments, **options: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))

    def steps(numbers, found):
        for number in numbers:
            found.before(number, {})
            calls.append(number)
        found.after(numbers[-1])
        found.stop()

    for numbers, expected in (
        (range(1, 8), [1, 2, 3, "start", 4, 5, "stop", 6, 7]),
        (range(5, 8), ["start", 5, "stop", 6, 7]),  # resumed in the middle
        (range(6, 8), [6, 7]),  # resumed behind it
        (range(1, 5), [1, 2, 3, "start", 4, "stop"]),  # interrupted in it
    ):
        calls.clear()
        steps(numbers, Profile(range(4, 6), None))
        assert calls == expected


def test_a_trace_that_fails_is_one_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "profile").write_text("a file is in the way")
    found = Profile(range(1, 3), tmp_path / "profile")
    with caplog.at_level(logging.WARNING):
        for number in (1, 2, 3):
            found.before(number, {})
    assert len(caplog.records) == 1 and "no trace of these steps" in caplog.text
    caplog.clear()
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *arguments, **options: 1 / 0)
    found = Profile(range(1, 3), tmp_path)
    found.before(1, {})
    found.before(2, {})
    assert [record.getMessage() for record in caplog.records] == ["profile: no trace of these steps: division by zero"]


def test_spans_that_are_none(text, tmp_path):
    for value, fault in (
        ("5", "5 is a number; in a YAML file, quote it"),
        ("5-7", r"'5-7' is no span of steps; write start:stop, as 10:15 for steps 10 to 14"),
        ("5:5", r"'5:5' has no step in it.*nearest: 5:6"),
        ("0:2", r"'0:2' has no step in it.*nearest: 1:2"),
        ("5:9", r"'5:9' goes beyond train.steps=6; nearest: 5:7"),
    ):
        with pytest.raises(ConfigError, match=f"train.profile: {fault}"):
            config(text, tmp_path, f"train.profile={value}")
    with pytest.raises(ConfigError, match=r"train.probes.evry: .*did you mean 'every'"):
        config(text, tmp_path, "train.probes.evry=3")
    good = config(text, tmp_path, "train.profile=5:7", "train.probes={every: 3}")
    save_config(tmp_path / "config.yaml", good)
    assert read_config(tmp_path / "config.yaml").train == good.train and good.train.profile == "5:7"


def test_the_step_is_the_same_program_with_probes(text, tmp_path, setup):
    state, batch = setup.abstract_state(), setup.layout.abstract_batch(4, 32)
    probed = prepare(config(text, tmp_path, "train.clip_norm=0.1", "train.probes.every=1"))
    assert probed.step.lower(state, batch).as_text() == setup.step.lower(state, batch).as_text()
