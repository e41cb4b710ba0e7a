"""A long run, killed again and again at random, ends where an undisturbed one does.

``make test-faults``. FAULT_KILLS (100), FAULT_PROCESSES (1) and FAULT_SEED (drawn, and printed) say how.
"""

import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

STEPS, EVERY = 300, 5
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PATIENCE = 300
"""Seconds after which processes that should have ended are a fault."""


@dataclass
class Campaign:
    """Processes that train one run, started and killed."""

    arguments: list[str]
    folder: object
    processes: int
    draw: random.Random
    kills: Counter = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)

    def start(self):
        """The processes of a session."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "-m", "efficient_lm", "train", *self.arguments, f"run.dir={self.folder}"]
        started = []
        for index in range(self.processes):
            group = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(self.processes)}
            environment = os.environ | (group | {"JAX_PROCESS_ID": str(index)} if self.processes > 1 else {})
            with open(f"{self.folder}.{index}.log", "ab") as log:
                started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        return started

    def step(self):
        """The last step that has a row."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def saved(self):
        """The newest step that has a checkpoint."""
        places = (self.folder / "checkpoints").glob("[0-9]*")
        return max((int(place.name) for place in places), default=0)

    def disturb(self):
        """One session, ended by a signal at a random moment to all processes or one; what it lost is noted."""
        began, before = time.monotonic(), self.saved()
        started = self.start()
        number, alone = self.draw.choice(SIGNALS), self.draw.random() < 0.5
        # Half way through its first seconds, or after so many steps; then a little later.
        early, steps = self.draw.random() < 0.2, self.draw.randint(1, 2 * EVERY)
        wait, pause = self.draw.uniform(0, 6), self.draw.uniform(0, 0.3)
        while all(process.poll() is None for process in started):
            if time.monotonic() - began > (wait if early else PATIENCE) or self.step() >= before + steps:
                break
            time.sleep(0.005)
        if self.step() > before:
            self.starts.append(time.monotonic() - began)
        time.sleep(pause)
        for process in [self.draw.choice(started)] if alone else started:
            process.send_signal(number)
        deadline = time.monotonic() + PATIENCE
        for process in started:
            process.wait(max(deadline - time.monotonic(), 1))
        self.kills[f"{number.name} to {'one' if alone else 'all'}"] += 1
        lost = self.step() - self.saved()
        if number == signal.SIGKILL:
            self.lost.append(lost)
        else:
            assert lost <= 0 or self.saved() == before, "a run that was asked to stop saves its last step"

    def finish(self):
        """Train to the end."""
        assert [process.wait(3600) for process in self.start()] == [0] * self.processes


def state(folder):
    """Parameters and optimizer at the end, wherever the devices are that they were saved from."""
    where, here = folder / "checkpoints" / str(STEPS), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    saved = ocp.checkpointables_metadata(where).metadata
    wanted = {name: saved[name] for name in ("parameters", "optimizer")}
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), wanted)
    return jax.tree.leaves(ocp.load_checkpointables(where, placed))


@pytest.mark.faults
def test_many_kills_and_restarts_end_like_an_undisturbed_run(overrides, curve, tmp_path):
    kills, processes = int(os.environ.get("FAULT_KILLS", 100)), int(os.environ.get("FAULT_PROCESSES", 1))
    seed = int(os.environ.get("FAULT_SEED", secrets.randbelow(1 << 32)))
    print(f"\nFAULT_SEED={seed} FAULT_KILLS={kills} FAULT_PROCESSES={processes}")
    options = {
        "train.steps": STEPS, "train.checkpoint_every": EVERY, "train.evaluate_every": 50, "train.batch_size": 64,
        "train.sequence_length": 128, "model.width": 64, "train.keep_checkpoints": 2, "train.start_timeout": 60,
    }  # fmt: skip
    arguments = overrides("unused", **options)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    Campaign(arguments, whole, processes, random.Random(0)).finish()
    campaign = Campaign(arguments, folder, processes, random.Random(seed))
    for number in range(kills):
        campaign.disturb()
        print(f"kill {number + 1}: step {campaign.step()}, saved {campaign.saved()}", flush=True)
    campaign.finish()
    print(f"{dict(campaign.kills)}; steps lost by a SIGKILL: {sorted(Counter(campaign.lost).items())}")
    print(f"first steps after {np.median(campaign.starts or [0]):.1f} s (median)")
    assert curve(folder) == curve(whole)
    assert all(np.array_equal(a, b) for a, b in zip(state(folder), state(whole), strict=True))
    # A save takes some steps itself: until it is whole, the one before it counts.
    assert max(campaign.lost, default=0) <= 2 * EVERY
    assert not list(folder.glob("damaged*"))
