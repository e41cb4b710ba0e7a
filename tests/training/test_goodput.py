"""Where time goes: phases that add up, and what sessions that were killed, resumed and finished come to."""

import json

import pytest

from efficient_lm.training.clock import PHASES, Clock, stepping_seconds
from efficient_lm.training.goodput import COMPLETE, SESSIONS_FILE, Sessions, goodput, read_sessions


class Time:
    """A clock that is moved by hand."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


def spent(**seconds):
    return dict.fromkeys(PHASES, 0.0) | seconds


def test_a_phase_inside_another_interrupts_it():
    time = Time()
    clock = Clock(time)
    time.passes(3)
    clock.begin()
    with clock.measure("evaluation"):
        time.passes(2)
        with clock.measure("compile"):
            time.passes(5)
        time.passes(1)
    time.passes(4)
    found = clock.seconds()
    assert (found["startup"], found["evaluation"], found["compile"], found["training"]) == (3, 3, 5, 4)
    assert sum(found.values()) == clock.elapsed() == 15 and stepping_seconds(found) == 4


def test_waiting_for_batches_is_measured_and_changes_nothing():
    time = Time()
    clock = Clock(time)
    clock.begin()

    def slow():
        for number in range(3):
            time.passes(0.5)
            yield number

    for expected, item in enumerate(clock.waiting(slow())):
        assert item == expected
        time.passes(1)
    assert clock.seconds()["data_wait"] == 1.5 and clock.seconds()["training"] == 3


def test_a_run_that_was_killed_and_resumed(tmp_path):
    time = Time()
    first = Sessions(tmp_path, 0, now=time)
    time.passes(30)
    first.beat(10, spent(startup=4, compile=6, training=15, data_wait=5))  # 2 s a step
    time.passes(11)
    first.beat(15, spent(startup=4, compile=6, training=25, data_wait=5, checkpoint=1))
    time.passes(10)
    first.beat(20, spent(startup=4, compile=6, training=35, data_wait=5, checkpoint=1))
    time.passes(100)  # Killed, and started again later from the checkpoint of step 15.
    second = Sessions(tmp_path, 15, elapsed=7, now=time)
    time.passes(3)
    second.beat(15, spent(startup=8, restore=2))
    time.passes(12)
    second.beat(21, spent(startup=8, restore=2, training=12))
    found = goodput(read_sessions(tmp_path))
    assert found == {
        "goodput": pytest.approx(42 / 166), "wall_seconds": pytest.approx(166), "training_seconds": pytest.approx(42),
        "lost_seconds": pytest.approx(10), "startup_seconds": 12, "restore_seconds": 2, "compile_seconds": 6,
        "evaluation_seconds": 0, "checkpoint_seconds": 1, "down_seconds": pytest.approx(93), "lost_steps": 5,
        "sessions": 2,
    }  # fmt: skip
    assert time.now - 1000 == pytest.approx(found["wall_seconds"])


def test_steps_between_two_signs_are_lost_in_proportion(tmp_path):
    first = Sessions(tmp_path, 0, now=lambda: 0.0)
    first.beat(10, spent(training=20))
    Sessions(tmp_path, 4, now=lambda: 20.0).beat(10, spent(training=12))
    found = goodput(read_sessions(tmp_path))
    assert (found["training_seconds"], found["lost_seconds"], found["lost_steps"]) == (20, 12, 6)


def test_falling_back_beyond_the_session_before_loses_of_both(tmp_path):
    for start, end in ((0, 10), (10, 20), (5, 6)):
        Sessions(tmp_path, start, now=lambda: 0.0).beat(end, spent(training=end - start))
    found = goodput(read_sessions(tmp_path))
    assert (found["training_seconds"], found["lost_seconds"], found["lost_steps"]) == (6, 15, 15)


def test_time_after_the_end_is_nobodys(tmp_path):
    Sessions(tmp_path, 0, now=lambda: 0.0).beat(10, spent(training=10), COMPLETE)
    Sessions(tmp_path, 10, now=lambda: 1e6).beat(20, spent(training=10), COMPLETE)
    assert goodput(read_sessions(tmp_path))["goodput"] == 1.0


def test_a_torn_line_stays_a_line_of_its_own(tmp_path):
    Sessions(tmp_path, 0, now=lambda: 0.0).beat(10, spent(training=10))
    with (tmp_path / SESSIONS_FILE).open("a") as file:
        file.write('{"session": 1, "time": 12, "st')
    Sessions(tmp_path, 10, now=lambda: 10.0).beat(20, spent(training=10))
    rows = read_sessions(tmp_path)
    assert [row["event"] for row in rows] == ["start", "beat", "start", "beat"]
    assert goodput(rows)["sessions"] == 2
    assert len((tmp_path / SESSIONS_FILE).read_text().splitlines()) == 5


def test_what_cannot_be_written_is_one_warning(tmp_path, caplog):
    (tmp_path / SESSIONS_FILE).mkdir()
    sessions = Sessions(tmp_path, 0)
    sessions.beat(1, spent(training=1.0))
    assert len(caplog.records) == 1 and "goodput is left out" in caplog.text
    assert goodput(read_sessions(tmp_path)) is None


def test_lines_of_something_else_are_passed_over(tmp_path):
    lines = ["[]", "{}", json.dumps({"session": 1, "time": 0, "step": 1, "event": "beat"})]
    (tmp_path / SESSIONS_FILE).write_text("\n".join(lines))
    assert read_sessions(tmp_path) == []
