"""Threads that give way: they, what they start and TensorStore's have a low priority, and no other has."""

import os
import sys
import threading

import jax.numpy as jnp
import pytest

from efficient_lm.training.checkpoints import Checkpoints
from efficient_lm.training.priority import NICENESS, give_way, threads_of_tensorstore

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
    theirs = threads_of_tensorstore()
    assert theirs and {niceness(number) for number in theirs} == {lowered}


def test_threads_that_end_while_they_are_listed_are_passed_over():
    stop = threading.Event()

    def come_and_go():
        while not stop.is_set():
            threading.Thread(target=int).start()

    coming = threading.Thread(target=come_and_go)
    coming.start()
    try:
        assert all(threading.get_native_id() not in threads_of_tensorstore() for _ in range(200))
    finally:
        stop.set()
        coming.join()


@pytest.mark.parametrize("going_on", [True, False])
def test_only_a_save_that_steps_follow_gives_way(going_on, tmp_path):
    found, before = [], niceness()
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"parameters": {"a": jnp.zeros(4)}}, {"step": step}, going_on if step == 2 else True)
        found.append(checkpoints._thread.submit(niceness).result())
    checkpoints.close()
    assert (found[1] > before) == going_on
