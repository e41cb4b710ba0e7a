"""What `efficient-lm benchmark` measures: cases that fit their operators, a gate that a wrong form does not pass."""

import dataclasses
import json
import subprocess
import sys

import jax
import pytest

from kernels_pallas import kernel, tuning
from kernels_pallas.benchmark import calls, ceilings, forms, gate, peers, race, session
from kernels_pallas.benchmark.cases import _SIZES, REGISTRY, SETS, Case, cases
from kernels_pallas.benchmark.tune import choices, tune
from kernels_pallas.target import current, simulating

TINY = cases("linear_recurrence", "tiny", "float32")[0]


@pytest.mark.parametrize("op", calls.CALLS)
def test_cases_fit_their_operators(op):
    assert set(_SIZES[op]) <= set(SETS) and cases(op, "tiny") and cases(op, "models")
    for group in SETS:
        for case in cases(op, group):
            arrays = jax.eval_shape(case.inputs)
            outputs = jax.tree.leaves(jax.eval_shape(forms.forward(case, "xla"), arrays))
            given = sum(x.size * x.dtype.itemsize for x in arrays.values())
            wanted = list(case.call.outputs(**case.sizes).values())
            assert [x.shape for x in outputs[:1]] == wanted or not wanted
            moved = given + sum(x.size * x.dtype.itemsize for x in outputs[: len(wanted)])
            assert case.bytes(training=False) == moved, case.name
            assert case.flops(training=False) > 0


def test_the_registry_of_flash_linear_attention_is_among_the_peers_shapes():
    names = " | ".join(case.name for case in cases("delta_rule", "peers"))
    for sizes in REGISTRY:
        assert " ".join(f"{key}{value}" for key, value in sizes.items()) in names


def test_counts_of_work():
    full, window = (
        Case("attention", {"B": 1, "T": 8, "H": 2, "G": 2, "K": 4, "V": 4, **more}) for more in ({}, {"window": 2})
    )
    assert full.exponentials(False) == 2 * 36 and full.flops(False) == 2 * 8 * 72
    assert window.exponentials(False) == 2 * (3 + 6 * 2)
    scan = Case("selective_scan", {"B": 8, "T": 2048, "D": 4096, "N": 16})
    assert scan.exponentials(False) == pytest.approx(1.07e9, rel=0.01)


def test_ceilings_go_by_the_longest_name():
    assert ceilings.ceiling("NVIDIA H200").bytes == 4.8e12
    assert ceilings.ceiling("TPU v5 lite").flops < ceilings.ceiling("TPU v5").flops
    assert ceilings.ceiling("cpu") is None


def test_a_wrong_form_is_told_and_not_timed(monkeypatch):
    assert gate.wrong(TINY, "xla") == []
    right = TINY.call.function

    def wrong(log_a, x, implementation):
        h, state = right(log_a, x, implementation=implementation)
        return (h if implementation == "reference" else h.at[0, -1].multiply(1.5)), state

    monkeypatch.setitem(calls.CALLS, "linear_recurrence", dataclasses.replace(TINY.call, function=wrong))
    faults = gate.wrong(case := cases("linear_recurrence", "tiny", "float32")[0], "xla")
    assert any("off by" in fault for fault in faults)
    row = race.race(case, ["xla", "fla"], False, 1)[0]
    assert row["why"].startswith("wrong: ") and "median_ms" not in row


def test_a_race_tells_figures_or_why_not(tmp_path):
    rows = race.race(TINY, ["pallas", "xla", "fla", "mamba_ssm", "reference"], True, 2)
    assert [row["peer"] for row in rows] == ["pallas", "xla", "fla", "reference"]
    assert "backend cpu" in rows[0]["why"] and rows[2]["why"] == "fla is not installed"
    assert 0 < rows[1]["low_ms"] <= rows[1]["median_ms"] <= rows[1]["high_ms"]
    lines = race.table(rows).splitlines()
    assert len(lines) == 5 and lines[2].split()[-1] == "1.00"
    race.save(tmp_path / "x.json", "linear_recurrence", rows)
    saved = json.loads((tmp_path / "x.json").read_text())
    assert saved["rows"][1]["peer"] == "xla" and saved["machine"]["versions"]["jax"] == jax.__version__


def test_peers_serve_what_they_have():
    assert peers.serves("cudnn", cases("attention", "tiny")[0]) and not peers.serves("cudnn", TINY)
    assert peers.serves("fla", TINY) and not peers.serves("mamba_ssm", TINY)


def test_tuning_writes_the_fastest_choice_that_is_right(monkeypatch, tmp_path):
    (tmp_path / "linear_recurrence").mkdir()
    monkeypatch.setattr(tuning, "HERE", tmp_path)
    tuning._table.cache_clear()
    small = Case("linear_recurrence", {"B": 1, "T": 20, "D": 128}, "float32")
    with simulating("tpu"):
        from kernels_pallas.linear_recurrence import mosaic_tpu

        monkeypatch.setattr(mosaic_tpu, "CHOICES", {"chunk": (8, 16)})
        found = list(tune(small, rounds=1))
    tuning._table.cache_clear()
    assert [blocks for blocks, _ in found] == [{"chunk": 8}, {"chunk": 16}] == list(choices({"chunk": (8, 16)}))
    assert all(isinstance(milliseconds, float) for _, milliseconds in found)
    (entry,) = json.loads((tmp_path / "linear_recurrence/tuning.json").read_text())["TPU v5"].items()
    assert entry[0] == "batch=1 time=32 channels=128" and entry[1]["blocks"] in ({"chunk": 8}, {"chunk": 16})
    assert entry[1]["milliseconds"]["pallas"] == min(milliseconds for _, milliseconds in found)


def test_tuning_needs_a_kernel():
    with pytest.raises(ValueError, match="linear_recurrence: no kernel for backend cpu"):
        list(tune(TINY, rounds=1))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("op", calls.CALLS)
def test_every_kernel_lists_choices_of_its_own_blocks(op, platform, monkeypatch):
    """And takes the last of each, which its buckets are asked for once."""
    case, usual = cases(op, "tiny")[0], []
    with simulating(platform), tuning.asked() as buckets:
        held = kernel.module(op, current())
        heuristic = held.heuristic
        monkeypatch.setattr(held, "heuristic", lambda *inputs: usual.append(heuristic(*inputs)) or usual[-1])
        with tuning.trying(op, {name: sizes[-1] for name, sizes in held.CHOICES.items()}):
            jax.eval_shape(forms.forward(case, "pallas"), jax.eval_shape(case.inputs))
    assert len(buckets) == 1 and set(held.CHOICES) <= set(usual[0])


@pytest.mark.slow
def test_where_jax_alone_is_installed():
    """The module runs by itself, imports none of this project's other packages, and says what it cannot do."""
    code = "import sys, runpy; runpy.run_module('kernels_pallas.benchmark', run_name='__main__')"
    code += "; assert not {'efficient_lm', 'flax', 'hydra', 'pydantic'} & set(sys.modules)"
    command = [sys.executable, "-c", code, "--op", "linear_recurrence", "--shapes", "tiny", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--peers", "xla", "--passes", "forward"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "linear_recurrence, B2 T75 D128, bfloat16, forward" in done.stdout, done.stderr


def test_what_cannot_be_measured_is_said():
    options = {"shapes": "tiny", "dtype": "float32", "peers": [], "passes": [], "rounds": 1, "output": None}
    with pytest.raises(session.Unfit, match="only: no case of attention has 'T9' in its name; valid: B1 T150"):
        session.run("attention", None, only="T9", **options)
