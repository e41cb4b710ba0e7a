"""Runs of two and four real processes: they compute what one does, save once, stop alike, and end when one is lost."""

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from efficient_lm.config import load_run_config
from efficient_lm.training import loop
from efficient_lm.training.checkpoints import Checkpoints
from efficient_lm.training.reporting import read_metrics
from efficient_lm.training.run_directory import RunDirectory


def arguments(folder, **options):
    base = {
        "tokenizer": "bytes", "run.name": "test", "run.dir": folder, "model.width": 16, "model.repeats": 2,
        "mixer.heads": 2, "train.steps": 12, "train.batch_size": 8, "train.sequence_length": 32, "train.log_every": 1,
        "train.evaluate_every": 6, "train.evaluate_rows": 10, "train.checkpoint_every": 4, "data.holdout_every": 200,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in {**base, **options}.items()]


GREETING = re.compile(
    r"(\[Gloo\] Rank |\d| is connected to | peer ranks\. |Expected number of connected peer ranks is : )*"
)
"""What the library that connects processes prints, by pieces: those of two threads may come mixed."""

ENDLESS = {
    "train.steps": 100_000,
    "train.checkpoint_every": 20,
    "train.evaluate_every": "null",
    "train.peer_timeout": 6,
}


def figures(folder, *names):
    rows = read_metrics(folder)
    return [[row[name] for row in rows if name in row] for name in names]


def losses(folder):
    return figures(folder, "loss")[0]


def close(folder, other):
    for name in ("loss", "grad_norm", "val_loss", "val_bits_per_byte"):
        np.testing.assert_allclose(figures(folder, name)[0], figures(other, name)[0], rtol=1e-5, err_msg=name)
    assert figures(folder, "step", "tokens") == figures(other, "step", "tokens")


def bits(folder, step):
    """The bytes of every array of a checkpoint."""
    import jax

    from efficient_lm.training.setup import prepare

    config = load_run_config(arguments(folder))
    abstract = prepare(config).abstract_state()
    checkpoints = Checkpoints(Path(folder) / "checkpoints")
    items, _ = checkpoints.restore({"parameters": abstract.pop("parameters"), "optimizer": abstract}, [step])
    checkpoints.close()
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(items)]


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def running(started, folder, step):
    """Wait until a step's row is there."""
    started.until(lambda: (folder / "metrics.jsonl").exists() and len(losses(folder)) >= step)


@pytest.fixture(scope="module")
def whole(processes, tmp_path_factory):
    """A run of two processes in one go."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    started = processes(2, 2, arguments(folder))
    assert started.wait() == [0, 0], started.output(0) + started.output(1)
    return folder, started


def test_two_processes_train_what_one_does_and_write_it_once(whole, tmp_path):
    folder, started = whole
    loop.train(load_run_config(arguments(tmp_path / "one", **{"train.checkpoint_every": 100})))
    close(folder, tmp_path / "one")
    assert names(folder) == ["12", "4", "8"]
    assert json.loads((folder / "summary.json").read_text())["step"] == 12
    assert "step 12/12" in started.output(0) and "summary.json" in started.output(0)
    spoken = [line for line in started.output(1).splitlines() if not GREETING.fullmatch(line)]
    assert spoken == [], spoken


def goes_on(processes, stopped, tmp_path, count, devices):
    folder = tmp_path / f"on_{count}"
    shutil.copytree(stopped, folder)
    started = processes(count, devices, arguments(folder, **{"train.steps": 12}))
    assert started.wait() == [0] * count, started.output(0)
    assert "resuming" in started.output(0) and "from step 8" in started.output(0)
    return folder


@pytest.mark.slow
def test_stopped_and_resumed_with_two_is_the_same_to_the_bit_and_with_one_and_four_to_rounding(
    processes, whole, tmp_path
):
    stopped = tmp_path / "stopped"
    shutil.copytree(whole[0], stopped)
    shutil.rmtree(stopped / "checkpoints" / "12")
    again = goes_on(processes, stopped, tmp_path, 2, 2)
    assert losses(again) == losses(whole[0]) and bits(again, 12) == bits(whole[0], 12)
    close(goes_on(processes, stopped, tmp_path, 4, 1), whole[0])
    close(goes_on(processes, stopped, tmp_path, 1, 4), whole[0])


@pytest.mark.slow
def test_a_tensor_axis_across_processes_and_fsdp(processes, whole, tmp_path):
    presets = {"fsdp": {"parallelism": "fsdp"}, "tensor": {"parallelism": "fsdp_tensor", "parallelism.mesh.tensor": 4}}
    for name, options in presets.items():
        started = processes(2, 2, arguments(tmp_path / name, **options))
        assert started.wait() == [0, 0], started.output(0) + started.output(1)
        close(tmp_path / name, whole[0])


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_the_same_step(processes, tmp_path):
    folder = tmp_path / "signalled"
    started = processes(2, 2, arguments(folder, **ENDLESS))
    running(started, folder, 5)
    started.popens[1].send_signal(signal.SIGTERM)
    assert started.wait(60) == [143, 143], started.output(0) + started.output(1)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["stopped_by"] == "SIGTERM" and summary["step"] == max(map(int, names(folder)))
    assert f"the same command goes on from step {summary['step']}" in started.output(0)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_with_a_message_and_loses_nothing_saved(processes, tmp_path, victim):
    folder = tmp_path / "killed"
    started = processes(2, 2, arguments(folder, **ENDLESS))
    running(started, folder, 25)
    started.until(lambda: (folder / "checkpoints" / "20").is_dir())
    started.popens[victim].kill()
    other = 1 - victim
    statuses = started.wait(60)
    assert statuses[other] == 6 and statuses[victim] == -9, started.output(other)
    last = started.output(other).splitlines()[-1]
    assert f"error: process {victim} (" in last and "ended without a word" in last and "goes on from there" in last
    again = processes(2, 2, arguments(folder, **ENDLESS | {"train.steps": 24}))
    assert again.wait() == [0, 0] and "from step" in again.output(0)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_hangs_ends_the_others_within_the_stated_time(processes, tmp_path, victim):
    folder = tmp_path / "hung"
    started = processes(2, 2, arguments(folder, **ENDLESS))
    running(started, folder, 3)
    started.popens[victim].send_signal(signal.SIGSTOP)
    other = 1 - victim
    assert started.popens[other].wait(60) == 6, started.output(other)
    assert f"process {victim} (" in started.output(other) and "not been heard of for 6 s" in started.output(other)
    started.popens[victim].send_signal(signal.SIGCONT)
    assert started.popens[victim].wait(60) == 6, started.output(victim)


@pytest.mark.slow
def test_a_fault_in_one_ends_all_with_its_words(processes, tmp_path):
    with RunDirectory(tmp_path):
        started = processes(2, 2, arguments(tmp_path))
        assert started.wait() == [4, 4]
    assert "is in use by another run" in started.output(0)
    assert "process 0 (" in started.output(1) and "is in use by another run" in started.output(1)


@pytest.mark.slow
def test_divergence_and_the_end_of_time_are_seen_by_all(processes, tmp_path):
    options = {"optimizer.learning_rate": 1e30, "train.clip_norm": "null", "train.max_nonfinite": 3,
               "train.steps": 60, "schedule": "constant", "schedule.warmup": 0}  # fmt: skip
    started = processes(2, 2, arguments(tmp_path / "diverged", **options))
    assert started.wait() == [5, 5] and "not a number for 3 steps" in started.output(0)
    started = processes(2, 2, arguments(tmp_path / "short", **ENDLESS, **{"train.minutes": 0.02}))
    assert started.wait() == [0, 0] and "stopped by train.minutes" in started.output(0)


@pytest.mark.slow
def test_misuse_is_told_in_a_line(processes, tmp_path):
    alone = processes(2, 1, arguments(tmp_path / "a", **{"train.start_timeout": 20}), JAX_NUM_PROCESSES="3")
    half = processes(2, 1, arguments(tmp_path / "b"), JAX_COORDINATOR_ADDRESS=None)
    other = processes(2, 1, lambda index: arguments(tmp_path / "c", **{"run.seed": index}))
    assert alone.wait() == [6, 6] and half.wait() == [2, 2] and other.wait() == [2, 2]
    assert "1 of 3 processes did not come" in alone.output(0) and "did not let process 1 of 3 in" in alone.output(1)
    assert "JAX_COORDINATOR_ADDRESS: is not set, though JAX_NUM_PROCESSES=2 is" in half.output(0)
    assert "was started with another config" in other.output(0) and "another config" in other.output(1)
    assert not any((tmp_path / name).exists() for name in "abc")
    assert len(half.output(0).splitlines()) == 1
