"""What a plan says, against counts by hand."""

import re

import jax
import pytest

from efficient_lm.cli.main import main
from efficient_lm.config import load_run_config
from efficient_lm.training.accounting import placements, plan
from efficient_lm.training.compiling import compiled_step, peak_bytes
from efficient_lm.training.machines import here
from efficient_lm.training.plan_table import placements as listed
from efficient_lm.training.setup import define

SMALL = ["model.width=32", "model.repeats=3", "model.vocab_size=64", "model.tied=true", "ffn=mlp", "ffn.hidden=64",
         "mixer.heads=4", "mixer.kv_heads=2", "train.sequence_length=16", "train.batch_size=4"]  # fmt: skip


def test_a_small_model_by_hand():
    figures = plan(load_run_config(SMALL))
    mixer, ffn = 3 * (32 * 32 * 2 + 32 * 16 * 2 + 32), 3 * (2 * 32 * 64 + 32)
    parts = {"embedding": 64 * 32, "layer.mixer": mixer, "layer.ffn": ffn, "head": 32}
    assert figures["parameters"] == {**parts, "total": sum(parts.values())}
    total = sum(parts.values())
    assert figures["bytes"]["parameters"] == figures["bytes"]["gradients"] == 4 * total
    # Two moments, and the optimizer's and the schedule's counts.
    assert 0 <= figures["bytes"]["optimizer"] - 8 * total <= 16
    keys_and_values, bookkeeping = 2 * 16 * 2 * 8 * 4, 2 * 16 * 4 + 4
    assert figures["bytes"]["cache_per_sequence"] == 3 * (keys_and_values + bookkeeping)
    assert figures["flops_per_token"]["training"] == 3 * figures["flops_per_token"]["forward"]
    sizes = figures["bytes"]
    assert sizes["peak"] == sum(sizes[part] for part in ("parameters", "gradients", "optimizer", "activations"))
    assert sizes["activations"] > 0 and sizes["peak"] == peak_bytes(load_run_config(SMALL))
    time = figures["time"]
    assert time["bound_by"] in [term["name"] for term in time["terms"]] == ["compute", "memory"]
    assert time["seconds"] == max(term["seconds"] for term in time["terms"])
    assert time["tokens_per_second"] == pytest.approx(4 * 16 / time["seconds"])
    assert time["terms"][0]["amount"] >= figures["flops_per_step"] and figures["collectives"] == {}


def operations(program):
    """What a compiled program does, line by line, without names, which say where that was written."""
    text = re.sub(r", metadata=\{[^}]*\}|%[\w.-]+", "", program.as_text())
    return [line for line in text.splitlines() if " = " in line]


def test_the_step_is_the_one_that_trains():
    """With all that a step may carry: what a run compiles has these operations, to the last."""
    keys = ["nesting=sample", "train.accumulate=2", "train.average.decay=0.9", "train.spike.action=skip"]
    keys += ["train.sequence_schedule=[{until: 4, size: 8}]", "optimizer=muon"]
    defined = define(load_run_config([*SMALL, *keys]))
    spikes = jax.device_put(defined.config.train.spike.resumed({}), defined.layout.replicated)
    state = defined.abstract_state() | spikes
    lowered = defined.step.lower(state, defined.layout.abstract_batch(*defined.portions.largest.batch))
    planned = compiled_step(defined, here())
    assert operations(planned.program) == operations(lowered.compile())


def test_where_parameters_live_is_counted_for_one_device():
    config = load_run_config([*SMALL, "parallelism=fsdp_tensor", "train.batch_size=8"])
    defined = define(config, jax.devices()[:1] * 8)
    found = {each.path: each for each in placements(defined.model, defined.abstract_state())}
    query = found["stack.segment_0.layer_0.mixer.inner.query.weight"]
    assert (query.axes, query.shape) == (("layers", "embed/fsdp", "heads/tensor", "head_dim"), (3, 32, 4, 8))
    assert (query.parameter, query.optimizer) == (4 * 3 * 32 * 32 // 8, 8 * 3 * 32 * 32 // 8)
    norm = found["stack.segment_0.layer_0.ffn.input_norm.scale"]
    assert (norm.axes, norm.parameter, norm.optimizer) == (("layers", "embed"), 4 * 3 * 32, 8 * 3 * 32)
    printed = "\n".join(listed({"mesh": dict(defined.layout.mesh.shape), "placements": list(found.values())}))
    assert "on each device of fsdp=4 × tensor=2" in printed
    assert "layers=3 embed/fsdp=32 heads/tensor=4 head_dim=8" in printed and "1.54 kB" in printed


def test_a_plan_needs_no_files(capsys):
    small = [item for item in SMALL if not item.startswith("model.vocab_size")]
    assert main(["plan", "data=files", "tokenizer=file", *small]) == 2
    assert "model.vocab_size: null takes the tokenizer's" in capsys.readouterr().err
    assert main(["plan", "data=files", "tokenizer=file", *SMALL]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions"), [("transformer_124m", 124), ("transformer_350m", 350), ("transformer_1b", 1076)]
)
def test_the_large_experiments_have_their_size(name, millions):
    from efficient_lm.composition import compose
    from efficient_lm.config import RunConfig
    from efficient_lm.models.parameters import count_parameters
    from efficient_lm.validation import validate

    values = compose("train", [f"experiment={name}"], optional=("data", "tokenizer")).values
    values |= {"data": {"source": {"kind": "sotu"}}, "tokenizer": {"kind": "bytes"}}
    model = validate(RunConfig, values).model.build()
    assert count_parameters(model.declarations) / 1e6 == pytest.approx(millions, rel=0.05)
