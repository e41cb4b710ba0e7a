"""A sweep of real runs whose processes are killed at random ends with the table of an undisturbed one.

``make test-faults``. FAULT_SWEEP_KILLS (20) and FAULT_SEED (drawn, and printed) say how.
"""

import json
import os
import random
import resource
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

AXES = ["mixer=attention,gla,delta_net", "optimizer.learning_rate=1e-3,1e-2", "restarts=1000", "launcher.concurrent=2"]
OF_TIME = ("seconds", "tokens_per_second", "mfu", "goodput", "memory", "wait", "stall", "dispatch")
KINDS = ["sweep", "run", "machine", "memory"]
"""What is killed: see `disturb`."""
PATIENCE = 900
"""Seconds after which a sweep that nothing happens to has hung."""


def start(folder, keys):
    """A sweep in that folder, in the background."""
    command = [sys.executable, "-m", "efficient_lm", "sweep", *keys, *AXES, f"dir={folder}", "name=killed"]
    with open(f"{folder}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def alive(folder):
    """Numbers of the training processes of a sweep."""
    found, told = [], f"{folder}/runs/".encode()
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (place / "cmdline").read_bytes().split(b"\0")
            if b"train" in words and any(word.startswith(b"run.dir=") and told in word for word in words):
                found.append(int(place.name))
    return found


def out_of_memory(pid):
    """Let a process have no more memory than it has."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))


def disturb(kind, sweep, folder, draw):
    """Kill the sweep, one of its runs, or all at once as a machine does that goes down; or let a run's memory end."""
    runs = alive(folder)
    if kind == "memory":
        out_of_memory(draw.choice(runs))
    elif kind == "run":
        os.kill(draw.choice(runs), signal.SIGKILL)
    else:
        sweep.kill()
        sweep.wait()
        for pid in runs if kind == "machine" else ():
            os.kill(pid, signal.SIGKILL)


def rows(folder):
    """The table, without what took time."""
    found = json.loads((folder / "table.json").read_text())["rows"]
    for row in found:
        named = row["figures"].items()
        row["figures"] = {name: value for name, value in named if not any(word in name for word in OF_TIME)}
    return found


@pytest.mark.faults
def test_a_sweep_whose_processes_are_killed_ends_with_the_table_of_an_undisturbed_one(overrides, tmp_path):
    kills = int(os.environ.get("FAULT_SWEEP_KILLS", 20))
    seed = int(os.environ.get("FAULT_SEED", secrets.randbelow(1 << 32)))
    print(f"\nFAULT_SEED={seed} FAULT_SWEEP_KILLS={kills}")
    options = {"train.steps": 600, "train.checkpoint_every": 20, "train.evaluate_every": 200, "train.batch_size": 16}
    keys = [key for key in overrides("unused", **options) if not key.startswith("run.")]
    whole, folder, draw = tmp_path / "whole", tmp_path / "killed", random.Random(seed)
    kinds = (KINDS * kills)[:kills]
    draw.shuffle(kinds)
    assert start(whole, keys).wait(PATIENCE) == 0, Path(f"{whole}.log").read_text()
    done, sweep, deadline = Counter(), None, time.monotonic() + 3 * PATIENCE
    while done.total() < kills:
        assert time.monotonic() < deadline, done
        if sweep is None:
            sweep = start(folder, keys)
        time.sleep(draw.uniform(2, 15))
        assert sweep.poll() in (None, 0), Path(f"{folder}.log").read_text()
        if sweep.poll() == 0:
            break
        kind = kinds[done.total()]
        with suppress(IndexError, ProcessLookupError, FileNotFoundError):  # no run is there just now
            disturb(kind, sweep, folder, draw)
            done[kind] += 1
        sweep = sweep if sweep.poll() is None else None
    print(f"{dict(done)}")
    assert done.total() == kills, "the sweep was through before: more steps, or fewer seconds between kills"
    assert (sweep or start(folder, keys)).wait(PATIENCE) == 0, Path(f"{folder}.log").read_text()
    assert rows(folder) == rows(whole) and len(rows(whole)) == 6
    assert alive(folder) == []
