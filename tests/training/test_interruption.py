"""Signals: heard while the main thread is busy, once to save and stop, and once more to stop at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from efficient_lm.training.interruption import Interruption

BUSY = """
import ctypes, signal, sys, time
signal.alarm(100)  # Whatever the test comes to, this process ends.
from efficient_lm.training.interruption import Interruption
with Interruption() as interruption:
    print("ready", flush=True)
    while sys.argv[1] == "deaf":
        ctypes.CDLL(None).sleep(100)  # Nothing of Python runs in this thread meanwhile.
    while not interruption.signal:
        time.sleep(0.01)
print("saved", interruption.signal, flush=True)
"""


def start(mode, *before, **options):
    command = [*before, sys.executable, "-c", BUSY, mode]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout.readline() == "ready\n"
    return process


def heard(interruption):
    deadline = time.monotonic() + 20
    while not interruption.signal and time.monotonic() < deadline:
        time.sleep(0.001)
    return interruption.signal


@pytest.mark.parametrize("number", Interruption.signals, ids=lambda number: number.name)
def test_a_signal_is_a_request_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert interruption.signal == 0
        os.kill(os.getpid(), number)
        assert heard(interruption) == number
        os.kill(os.getpid(), number)  # So soon it is the same one.
        time.sleep(0.05)
    assert signal.getsignal(number) is before


def test_the_second_ends_a_process_whose_main_thread_hears_nothing():
    process = start("deaf", stderr=subprocess.PIPE)
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == "SIGTERM: saving and stopping; once more to stop at once\n"
    time.sleep(1.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


def test_a_lost_terminal_is_a_request_unless_it_is_to_be_ignored():
    process = start("listening", stderr=subprocess.DEVNULL)
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=20)[0] == "saved 1\n"
    process = start("listening", "nohup", stderr=subprocess.DEVNULL)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "saved 15\n"
