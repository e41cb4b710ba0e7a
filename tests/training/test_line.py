"""The line between processes, with threads in their place: meeting, exchanging, failing, silence, standing still."""

import contextlib
import json
import socket
import threading
import time

import pytest

from efficient_lm.errors import ConfigError, ResourceError
from efficient_lm.training.group import Group, free_address
from efficient_lm.training.line import Line


class Ended(Exception):
    pass


class Lines:
    """Lines of one run, one for each of `count` processes; what ends a process is kept in `ends`."""

    def __init__(self, count, fingerprints=None, **timeouts):
        host, port = free_address("127.0.0.1").split(":")
        limits = {"start_timeout": 10, "peer_timeout": 30, "step_timeout": 30} | timeouts
        self.ends = {}
        self.lines = [
            Line(Group(host, int(port), count, index), (fingerprints or ["same"] * count)[index], **limits,
                 advice="; go on", end=self.ender(index))
            for index in range(count)
        ]  # fmt: skip

    def ender(self, index):
        def end(text, status):
            self.ends.setdefault(index, (text, status))
            self.lines[index]._over = True
            for peer in self.lines[index].peers.values():
                with contextlib.suppress(OSError):
                    peer.socket.shutdown(socket.SHUT_RDWR)

        return end

    def together(self, action, indices=None):
        """What `action(line)` returns or raises in each, all at once."""
        found = {}

        def act(index):
            try:
                found[index] = action(self.lines[index])
            except Exception as error:
                found[index] = error

        indices = range(len(self.lines)) if indices is None else indices
        threads = [threading.Thread(target=act, args=(index,)) for index in indices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return [found[index] for index in indices]

    def until_ended(self, indices, seconds=20):
        deadline = time.monotonic() + seconds
        while not set(indices) <= set(self.ends):
            assert time.monotonic() < deadline, self.ends
            time.sleep(0.02)


def test_all_meet_exchange_in_order_and_leave():
    run = Lines(3)
    assert run.together(lambda line: line.meet("hello" if line.group.index == 0 else None)) == ["hello"] * 3
    for question in range(3):
        answers = run.together(lambda line, question=question: line.exchange([question, line.group.index]))
        assert answers == [[[question, 0], [question, 1], [question, 2]]] * 3
    assert run.together(lambda line: line.leave()) == [None] * 3 and run.ends == {}


def test_whoever_does_not_come_is_named():
    run = Lines(3, start_timeout=0.8)
    missed, waited = run.together(lambda line: line.meet(None), [0, 2])
    assert isinstance(missed, ResourceError) and isinstance(waited, ResourceError)
    assert "1 of 3 processes did not come" in str(missed) and "within 0.8 s: 1;" in str(missed)
    assert "process 0 did not let process 2 of 3 in" in str(waited) and missed.status == 6


def test_nobody_at_the_address():
    (error,) = Lines(2, start_timeout=0.5).together(lambda line: line.meet(None), [1])
    assert isinstance(error, ResourceError) and "within 0.5 s (Connection refused)" in str(error)


def test_other_configs_are_refused_everywhere():
    errors = Lines(3, ["same", "same", "other"]).together(lambda line: line.meet(None))
    assert all(isinstance(error, ConfigError) for error in errors)
    assert all("process 2" in str(error) and "another config" in str(error) for error in errors)


def test_a_stranger_is_hung_up_on_and_a_second_of_the_same_number_is_told():
    run = Lines(2)
    host = run.lines[0].group
    first = threading.Thread(target=lambda: run.lines[0].meet("hello"))
    first.start()
    time.sleep(0.2)
    with socket.create_connection((host.host, host.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\n")
        assert stranger.recv(100) == b""
    with socket.create_connection((host.host, host.port)) as twin:
        hello = {"index": 0, "count": 2, "fingerprint": "same", "where": "here"}
        twin.sendall(json.dumps(hello).encode() + b"\n")
        assert "there is a process 0 already" in json.loads(twin.makefile().readline())["refused"]
    assert run.lines[1].meet(None) == "hello"
    first.join()
    run.together(lambda line: line.leave())


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_ends_the_others_with_its_words_and_status(failing, monkeypatch):
    monkeypatch.setattr("efficient_lm.training.line.PATIENCE", 0.5)
    run = Lines(3)
    run.together(lambda line: line.meet(None))
    others = [index for index in range(3) if index != failing]
    run.lines[failing].fail("train.txt: is gone", 3)
    run.until_ended(others)
    for index in others:
        text, status = run.ends[index]
        assert text.startswith(f"process {failing} (") and "failed: train.txt: is gone; go on" in text and status == 3
    assert failing not in run.ends


@pytest.mark.parametrize("dying", [0, 1])
def test_a_death_is_noticed_at_once(dying):
    run = Lines(3)
    run.together(lambda line: line.meet(None))
    run.lines[dying]._over = True  # It does not go on to tell the second that the first has gone.
    for peer in run.lines[dying].peers.values():
        peer.socket.shutdown(socket.SHUT_RDWR)
    others = [index for index in range(3) if index != dying]
    run.until_ended(others, 5)
    assert all("ended without a word; go on" in run.ends[index][0] for index in others)
    assert all(run.ends[index][1] == 6 and f"process {dying} (" in run.ends[index][0] for index in others)


def test_silence_is_noticed_after_the_stated_time(monkeypatch):
    run = Lines(2, peer_timeout=2)
    monkeypatch.setattr(run.lines[1], "_watch", lambda: None)
    run.lines[1]._thread = threading.Thread(target=lambda: None)
    run.together(lambda line: line.meet(None))
    run.until_ended([0])
    assert "process 1 (" in run.ends[0][0] and "has not been heard of for 2 s; go on" in run.ends[0][0]


def test_a_run_that_is_stuck_ends_and_names_the_last():
    run = Lines(3, step_timeout=2.5)
    run.together(lambda line: line.meet(None))
    run.together(lambda line: line.progress(7 if line.group.index == 2 else 8))
    run.until_ended([0, 1, 2])
    for index in range(3):
        text, status = run.ends[index]
        assert "no progress for 2.5 s; the last is process 2 (" in text and "after 7 steps" in text and status == 6
