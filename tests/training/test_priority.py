"""Threads that give way: they, what they start and TensorStore's have a low priority, and no other has."""

import os
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import pytest

from efficient_lm.training.checkpoints import Checkpoints
from efficient_lm.training.priority import NICENESS, OF_TENSORSTORE, give_way

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")


def niceness(thread=0):
    return os.getpriority(os.PRIO_PROCESS, thread)


def test_a_thread_that_gives_way_and_what_it_starts(tmp_path):
    import tensorstore

    tensorstore.KvStore.open({"driver": "file", "path": f"{tmp_path}/"}).result().write(b"a", b"b").result()
    before, found = niceness(), {}

    def work():
        give_way()
        found["own"] = niceness()
        inner = threading.Thread(target=lambda: found.update(inner=niceness()))
        inner.start()
        inner.join()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    lowered = min(before + NICENESS, 19)
    assert found == {"own": lowered, "inner": lowered} and niceness() == before
    names = {int(path.name): (path / "comm").read_text() for path in Path("/proc/self/task").iterdir()}
    theirs = [number for number, name in names.items() if name.startswith(OF_TENSORSTORE)]
    assert theirs and {niceness(number) for number in theirs} == {lowered}


@pytest.mark.parametrize("going_on", [True, False])
def test_only_a_save_that_steps_follow_gives_way(going_on, tmp_path):
    found, before = [], niceness()
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"parameters": {"a": jnp.zeros(4)}}, {"step": step}, going_on if step == 2 else True)
        found.append(checkpoints._thread.submit(niceness).result())
    checkpoints.close()
    assert (found[1] > before) == going_on
