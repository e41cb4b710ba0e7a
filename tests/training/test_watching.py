"""What a row says of the machine: shares of the time of steps, utilisation where the chip is known, memory."""

import types
from pathlib import Path

import jax
import numpy as np
import pytest

from efficient_lm.training import memory, watching
from efficient_lm.training.clock import Clock
from efficient_lm.training.memory import memory_figures
from efficient_lm.training.watching import Watch
from kernels_pallas.benchmark.ceilings import matmul_flops


class Time:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def watch(monkeypatch, time, kind="cpu", flops=50.0):
    """A watch of a run whose step takes the host two seconds the first time and one later."""
    monkeypatch.setattr(watching, "step_flops_per_token", lambda config, model, length: flops * length)
    devices = [types.SimpleNamespace(device_kind=kind)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    clock, begun = Clock(time), []

    def step(state, batch):
        time.now += 1 if begun else 2
        begun.append(batch["tokens"].shape)
        return state, {}

    config = types.SimpleNamespace(
        precision=types.SimpleNamespace(compute="float32"), train=types.SimpleNamespace(profile=None, probes=None)
    )
    clock.begin()
    setup = types.SimpleNamespace(step=step, config=config, model=None)
    return Watch(setup, clock, Path("."), 0, 0), clock


def run(found, steps, start=0, length=8):
    for number in range(start + 1, start + steps + 1):
        found.step(number, {}, {"tokens": np.zeros((4, length))})


def test_compiling_is_not_the_time_of_steps(monkeypatch):
    time = Time()
    found, clock = watch(monkeypatch, time)
    run(found, 3)
    time.now += 2
    with clock.measure("checkpoint"):
        time.now += 7
    row = found.figures(3, 96)
    assert row["compile_seconds"] == 2 and row["checkpoint_seconds"] == 7 and "evaluation_seconds" not in row
    assert row["step_seconds"] == pytest.approx(4 / 3) and row["tokens_per_second"] == pytest.approx(24)
    assert row["dispatch"] == pytest.approx(0.5) and row["data_wait"] == 0 == row["metrics_wait"]
    assert "mfu" not in row
    run(found, 1, start=3, length=16)  # A new length compiles again.
    assert found.figures(4, 128)["compile_seconds"] == 1


def test_utilisation_where_the_chip_is_known(monkeypatch):
    time = Time()
    found, _ = watch(monkeypatch, time, kind="NVIDIA H200", flops=1e9)
    run(found, 2)
    time.now += 1
    found.figures(1, 32)
    time.now += 4
    run(found, 1, start=2)
    row = found.figures(3, 96)  # Two steps of 32 tokens in five seconds.
    assert row["mfu"] == pytest.approx(2 * 32 * 8 * 1e9 / 5 / (989e12 / 2) / 2)


def test_what_a_chip_can_do_depends_on_the_type():
    assert matmul_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 2 * matmul_flops("NVIDIA H100 80GB HBM3", "float32")
    assert matmul_flops("TPU v5 lite", "float32") == matmul_flops("TPU v5 lite", "bfloat16") == 197e12
    assert matmul_flops("cpu", "float32") is None


def test_memory_of_the_host_and_of_the_fullest_device(monkeypatch):
    assert set(memory_figures()) == {"host_memory_bytes"} and memory_figures()["host_memory_bytes"] > 2**20
    statistics = [{"bytes_in_use": 5, "peak_bytes_in_use": 9}, {"bytes_in_use": 7, "peak_bytes_in_use": 8}]
    devices = [types.SimpleNamespace(memory_stats=lambda each=each: each) for each in statistics]
    monkeypatch.setattr(memory.jax, "local_devices", lambda: devices)
    found = memory_figures()
    assert (found["device_memory_bytes"], found["device_memory_peak_bytes"]) == (7, 9)
