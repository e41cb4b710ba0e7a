"""Which implementation runs where: targets, tables of block sizes, what `auto` takes, and refusals."""

import importlib.machinery
import json
import logging
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import dispatch, kernel, tuning
from kernels_pallas.attention import attention
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.linear_recurrence import linear_recurrence
from kernels_pallas.target import Target, compiling_for, current, simulating

H200 = Target("gpu", "NVIDIA H200", hopper=True)
VALUES = jnp.full((1, 4, 8), -0.5)
SCAN = (VALUES, VALUES, jnp.zeros((8, 16)), jnp.zeros((1, 4, 16)), jnp.zeros((1, 4, 16)), None)


def choices(target, shapes="time=4"):
    return list(kernel.ranked("selective_scan", target, shapes, SCAN, xla=[], reference=[]))


def test_a_cpu_runs_no_kernel_and_says_what_can():
    with pytest.raises(dispatch.Unsupported) as refusal:
        linear_recurrence(VALUES, VALUES, implementation="pallas")
    assert str(refusal.value) == (
        "linear_recurrence: implementation 'pallas' cannot honour backend cpu "
        "(Pallas kernels run on TPUs and on NVIDIA Hopper GPUs); can: xla, reference"
    )


def test_other_gpus_run_no_kernel():
    target = Target("gpu", "NVIDIA A100")
    assert target.obstacles() == ["a NVIDIA A100 (Pallas kernels run on TPUs and on NVIDIA Hopper GPUs)"]
    assert H200.obstacles() == [] and Target("tpu", "TPU v5").obstacles() == []
    assert kernel.module("selective_scan", target) is None


def test_a_function_is_traced_anew_for_another_target():
    traced = []

    @jax.jit
    def function(x):
        traced.append(current().platform)
        return x

    function(1.0)
    with compiling_for(H200):
        function(1.0)
    with simulating("tpu"):
        function(1.0)
        assert current().simulated
    function(1.0)
    assert traced == ["cpu", "gpu", "tpu"]


def test_preferring_decides_what_auto_takes(caplog):
    obstacles = {"xla": [], "reference": [], "pallas": []}
    assert dispatch.choose("op", "auto", obstacles) == "xla"
    with dispatch.preferring("pallas"), caplog.at_level(logging.INFO, "kernels_pallas"):
        assert dispatch.choose("an_op", "auto", obstacles) == "pallas"
        assert dispatch.choose("an_op", "auto", obstacles | {"pallas": ["segment_ids"]}) == "xla"
        assert dispatch.choose("an_op", "reference", obstacles) == "reference"
        dispatch.choose("an_op", "auto", obstacles)
    assert [record.getMessage() for record in caplog.records].count("an_op: implementation pallas") == 1
    with dispatch.preferring("auto"):
        assert dispatch.choose("op", "auto", obstacles) == "xla"


def test_names_and_obstacles_are_told():
    obstacles = {"xla": [], "cudnn": ["sinks", "softcap"]}
    with pytest.raises(ValueError, match="op: no implementation 'triton'; valid: auto, xla, cudnn"):
        dispatch.choose("op", "triton", obstacles)
    with pytest.raises(dispatch.Unsupported, match="op: .*'cudnn' cannot honour sinks, softcap; can: xla"):
        dispatch.choose("op", "cudnn", obstacles)


def test_buckets_round_up():
    assert tuning.bucket(batch=1, time=1000, width=64) == "batch=1 time=1024 width=64"
    assert tuning.bucket(batch=0, time=1025) == "batch=1 time=2048"


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """Tables in a folder of the test's own."""
    (tmp_path / "selective_scan").mkdir()
    monkeypatch.setattr(tuning, "HERE", tmp_path)
    tuning._table.cache_clear()
    yield tmp_path
    tuning._table.cache_clear()


def test_a_table_gives_blocks_and_the_choice_of_auto(tables):
    shapes, heuristic = "time=4", {"chunk": 64, "stages": 2}
    assert tuning.blocks("selective_scan", H200, shapes, heuristic) == heuristic
    assert choices(H200) == ["xla", "reference", "pallas"]
    entry = {"blocks": {"chunk": 128}, "milliseconds": {"pallas": 1.0, "xla": 2.0}}
    path = tuning.write("selective_scan", H200.kind, shapes, entry)
    assert tuning.blocks("selective_scan", H200, shapes, heuristic) == {"chunk": 128, "stages": 2}
    assert choices(H200) == ["pallas", "xla", "reference"]
    assert choices(H200, "time=8")[0] == choices(Target("gpu", "NVIDIA H100", True))[0] == "xla"
    slower = {"blocks": {"chunk": 128}, "milliseconds": {"pallas": 3.0, "xla": 2.0}}
    tuning.write("selective_scan", H200.kind, "time=2", slower)
    assert choices(H200, "time=2") == ["xla", "pallas", "reference"]
    assert list(json.loads(path.read_text())[H200.kind]) == ["time=2", "time=4"]


@pytest.fixture
def tokamax(monkeypatch):
    """A package of that name, which computes with JAX alone and keeps what it was asked."""
    asked = []

    def dot_product_attention(q, k, v, bias, *, scale, is_causal, local_window_size, logits_soft_cap):
        asked.append(local_window_size)
        assert logits_soft_cap is None
        return jax.nn.dot_product_attention(
            q, k, v, bias, scale=scale, is_causal=is_causal, local_window_size=local_window_size
        )

    module = types.ModuleType("tokamax")
    module.__spec__ = importlib.machinery.ModuleSpec("tokamax", None)
    module.dot_product_attention, module.ragged_dot, module.asked = dot_product_attention, jax.lax.ragged_dot, asked
    monkeypatch.setitem(sys.modules, "tokamax", module)
    return module


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 3), (False, 3), (False, None)])
def test_tokamax_sees_what_attention_sees(causal, window, tokamax, error):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 9, heads, 8)) for i, heads in enumerate((4, 2, 2)))
    got, wanted = (
        attention(q, k, v, causal=causal, window=window, implementation=name) for name in ("tokamax", "reference")
    )
    assert error(got, wanted) < 1e-5
    assert tokamax.asked == [None if window is None else (2, 0 if causal else 2)]


def test_tokamax_leaves_nothing_in_rows_of_no_group(tokamax, error):
    x, w = jnp.ones((8, 4)), jax.random.normal(jax.random.key(0), (3, 4, 5))
    sizes = jnp.asarray([2, 0, 3])
    got, wanted = (grouped_matmul(x, w, sizes, implementation=name) for name in ("tokamax", "reference"))
    assert error(got, wanted) < 1e-5 and not np.any(got[5:])


def test_what_tokamax_cannot_honour_is_said():
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(
        dispatch.Unsupported, match="the package tokamax is not installed, sinks, segment_ids; can: xla"
    ):
        attention(x, x, x, sinks=jnp.zeros(2), segment_ids=jnp.ones((1, 4), int), implementation="tokamax")
