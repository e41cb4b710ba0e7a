"""The verb `plan`: its table, its JSON, and what it says of machines that are too small or not there."""

import importlib.util
import json

import pytest

from efficient_lm.training import memory

SMALL = ["model.width=16", "model.repeats=2", "model.vocab_size=64", "ffn.hidden=32", "mixer.heads=2",
         "train.sequence_length=64", "train.batch_size=16"]  # fmt: skip


def test_the_table_and_the_figures(run, tmp_path):
    status, printed, _ = run("plan", *SMALL, "decode=true", f"output={tmp_path / 'plan.json'}")
    assert status == 0
    for said in ("layer.mixer", "activations", "cache of one sequence of 64 tokens", "there is", "the longest of these",
                 "float32 products measured now", "memory of decoding one sequence of 64 tokens"):  # fmt: skip
        assert said in printed
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["machine"]["devices"] == 1 and figures["versions"]["jax"]
    assert figures["bytes"]["peak"] < figures["machine"]["memory"] and figures["placements"][0]["axes"]
    assert [term["name"] for term in figures["time"]["terms"]] == ["compute", "memory"]
    decoded = figures["decode"]["bytes"]
    assert decoded["parameters"] + decoded["cache"] < decoded["peak"] < figures["bytes"]["peak"]
    assert figures["decode"]["time"]["tokens_per_second"] > 0


def test_a_machine_that_is_too_small_is_refused_with_what_would_do(run, monkeypatch):
    monkeypatch.setattr("efficient_lm.training.machines.machine_memory", lambda: 1_500_000)
    status, printed, said = run("plan", *SMALL, "largest_batch=true")
    assert status == 6 and "largest batch that fits" in printed
    assert "a step needs" in said and "this machine, which has 1.50 MB; nearest that fits: train.accumulate=" in said
    monkeypatch.setattr("efficient_lm.training.machines.machine_memory", lambda: 10_000)
    status, printed, said = run("plan", *SMALL)
    assert status == 6 and "take more or larger devices" in said and len(said.splitlines()) == 1
    assert memory.machine_memory() > 1e9


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["target=gpu", "devices=8"], "devices: counts virtual CPU devices; of accelerators topology says how many"),
        (["topology=8", "devices=8"], "devices: counts virtual CPU devices"),
        (["target=cpu", "topology=8"], "topology: is of accelerators; for several virtual CPU devices give devices=8"),
        (["target=tpus"], "target: "),
        (["devices=1", "largest_batch=1"], "largest_batch: expected true or false"),
        (["target=tpu", "topology=8"], "topology: '8' is none of tpus; valid, for example: v5e:2x2"),
        (["topology=h200:12"], "topology: 'h200:12': more than 8 GPUs are hosts of 8, and 12 are not; nearest: 8"),
    ],
)
def test_machines_that_are_none_are_refused(run, keys, said):
    status, printed, error = run("plan", *SMALL, *keys)
    assert (status, printed) == (2, "") and said in error and len(error.splitlines()) == 1


def test_a_compiler_that_is_missing_is_named(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    status, printed, said = run("plan", *SMALL, "topology=v5p:2x2x1")
    assert (status, printed) == (2, "")
    assert said == (
        "error: target: the package libtpu is missing; pip install 'efficient-lm[ahead]' (in a checkout: make ahead)\n"
    )
