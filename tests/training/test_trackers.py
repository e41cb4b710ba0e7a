"""Trackers never stop a run: offline without a network, and given up when they fail."""

import json
import logging
import os
import struct
import subprocess
import sys
import types

import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.spec import OneOf, Spec
from efficient_lm.training.trackers import (
    NoTrackerSpec,
    SeveralTrackersSpec,
    TensorBoardSpec,
    TrackerSpec,
    WandbSpec,
    _reachable_mode,
)
from efficient_lm.validation import validate

OFFLINE = """
import sys
from efficient_lm.training.trackers import WandbSpec
again = [{"step": 2, "tokens": 8, "loss": 3.0}, {"step": 3, "tokens": 12, "loss": 2.0}]
for begin, end, repeated in ((1, 4, []), (2, 6, again)):
    spec = WandbSpec(group="tests", tags=("a",))
    tracker = spec.start(sys.argv[1], "small", {"train": {"steps": 3}}, begin - 1, repeated)
    for step in range(begin, end):
        tracker.log({"step": step, "tokens": 4 * step, "loss": 5.0 - step}, step)
    tracker.log({"step": end - 1, "tokens": 4 * step, "val_loss": 0.5}, end - 1)
    tracker.finish({"loss": 1.0})
"""


def tensorboard_events(folder):
    """The events of every file in order, each checked against its length and checksums (the TFRecord format)."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    def masked(data):
        crc = crc32c(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    found = []
    for path in sorted(folder.iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,), (check,) = struct.unpack_from("<Q", data, place), struct.unpack_from("<I", data, place + 8)
            body = data[place + 12 : place + 12 + length]
            assert check == masked(data[place : place + 8])
            assert masked(body) == struct.unpack_from("<I", data, place + 12 + length)[0]
            found.append(Event.FromString(body))
            place += 16 + length
    return found


def tensorboard_scalars(folder):
    """Tag → (step, value) of each point that TensorBoard shows: a session's start hides what was logged beyond it."""
    points = []
    for event in tensorboard_events(folder):
        if event.HasField("session_log"):
            points = [point for point in points if point[1] < event.step]
        shown = [value for value in event.summary.value if value.HasField("simple_value")]
        points += [(value.tag, event.step, round(value.simple_value, 4)) for value in shown]
    return {tag: [point[1:] for point in points if point[0] == tag] for tag in {tag for tag, _, _ in points}}


def wandb_records(path):
    """The records of an offline run's file: a log in blocks of 32 KiB, as LevelDB writes them, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, found, whole, place = path.read_bytes(), [], b"", 7
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(Record.FromString(whole))
            whole = b""
    return found


class FakeRun:
    url = "https://tracker.example"

    def __init__(self, calls, failing):
        self.calls, self.failing, self.summary = calls, failing, {}

    def define_metric(self, *arguments, **options):
        self.calls.append(("define_metric", options))

    def log(self, row):
        if self.failing:
            raise ConnectionError("the server is gone\nand more")
        self.calls.append(("log", row))

    def finish(self):
        self.calls.append(("finish", dict(self.summary)))


def fake_wandb(monkeypatch, calls, failing=False):
    def init(**options):
        calls.append(("init", options))
        return FakeRun(calls, failing)

    settings = types.SimpleNamespace(base_url="https://127.0.0.1:9")
    module = types.SimpleNamespace(
        init=init, Settings=lambda **options: settings, api=types.SimpleNamespace(api_key="key")
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def test_none_does_nothing(tmp_path):
    tracker = NoTrackerSpec().start(tmp_path, "name", {})
    tracker.log({"loss": 1.0}, 1)
    tracker.finish({})
    assert os.listdir(tmp_path) == []


def test_rows_and_summary_arrive(tmp_path, monkeypatch):
    calls = []
    fake_wandb(monkeypatch, calls)
    tracker = WandbSpec(mode="online", project="p", tags=("a", "b")).start(tmp_path, "name", {"a": 1})
    tracker.log({"loss": 2.0}, 7)
    tracker.finish({"loss": 1.5})
    options = calls[0][1]
    assert (options["project"], options["tags"], options["mode"], options["dir"]) == (
        "p",
        ["a", "b"],
        "online",
        tmp_path,
    )
    assert calls[1:] == [
        ("define_metric", {"step_metric": "step"}),
        ("log", {"loss": 2.0, "step": 7}),
        ("finish", {"loss": 1.5}),
    ]


def test_every_session_of_a_run_directory_is_one_run(tmp_path, monkeypatch):
    calls = []
    fake_wandb(monkeypatch, calls)
    for _ in range(2):
        WandbSpec(mode="online").start(tmp_path, "name", {})
    ids = [options["id"] for name, options in calls if name == "init"]
    assert len(ids) == 2 and ids[0] == ids[1] and len(ids[0]) == 12


def test_a_failure_is_one_warning(tmp_path, monkeypatch, caplog):
    fake_wandb(monkeypatch, [], failing=True)
    tracker = WandbSpec(mode="online").start(tmp_path, "name", {})
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            tracker.log({"loss": 2.0}, step)
        tracker.finish({})
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["wandb failed and is left out from here on: the server is gone"]


def test_so_is_one_at_the_start(tmp_path, monkeypatch, caplog):
    module = fake_wandb(monkeypatch, [])
    module.init = lambda **options: 1 / 0
    tracker = WandbSpec(mode="online").start(tmp_path, "name", {})
    tracker.log({}, 1)
    tracker.finish({})
    assert len(caplog.records) == 1 and "division by zero" in caplog.text


def test_rows_that_come_again_are_sent_once(tmp_path, monkeypatch):
    calls, again = [], [{"step": 3, "loss": 1.0}]
    fake_wandb(monkeypatch, calls)
    for repeated in ([], again):
        tracker = WandbSpec(mode="online").start(tmp_path, "name", {}, 2, repeated)
        tracker.log({"step": 3, "loss": 1.0}, 3)
        tracker.log({"step": 3, "val_loss": 1.0}, 3)
    rows = [list(row) for name, row in calls if name == "log"]
    assert rows == [["step", "loss"], ["step", "val_loss"], ["step", "val_loss"]]


def test_tensorboard_shows_every_step_once(tmp_path):
    for begin, end in ((1, 6), (4, 8)):  # The first session is killed after step 5 and goes on from step 3.
        tracker = TensorBoardSpec().start(tmp_path, "name", {"train": {"steps": 8}}, begin - 1)
        for step in range(begin, end):
            tracker.log({"step": step, "loss": 1 / step, "nothing": None}, step)
        tracker.log({"step": end - 1, "val_loss": 0.25}, end - 1)
    tracker.finish({"step": 7, "loss": 1 / 7})
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert tensorboard_scalars(tmp_path / "tensorboard") == {
        "loss": [(step, round(1 / step, 4)) for step in range(1, 8)],
        "val_loss": [(7, 0.25)],
    }
    texts = [value for event in tensorboard_events(tmp_path / "tensorboard") for value in event.summary.value]
    shown = {text.tag: text.tensor.string_val[0].decode() for text in texts if text.HasField("tensor")}
    assert '"steps": 8' in shown["config/text_summary"] and '"loss": 0.14' in shown["summary/text_summary"]


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    tracker = TensorBoardSpec().start(tmp_path, "name", {})
    tracker.log({"step": 1, "loss": 2.0}, 1)
    assert tensorboard_scalars(tmp_path / "tensorboard") == {"loss": [(1, 2.0)]}


def test_one_of_several_may_fail(tmp_path, monkeypatch, caplog):
    fake_wandb(monkeypatch, [], failing=True)
    spec = validate(Holder, {"tracker": {"kind": "several", "trackers": {
        "first": {"kind": "wandb", "mode": "online"}, "second": {"kind": "tensorboard"}}}}).tracker  # fmt: skip
    assert isinstance(spec, SeveralTrackersSpec) and validate(Holder, {"tracker": spec.dump()}).tracker == spec
    tracker = spec.start(tmp_path, "name", {})
    for step in (1, 2):
        tracker.log({"step": step, "loss": 2.0}, step)
    tracker.finish({"step": 2})
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "wandb failed and is left out from here on: the server is gone"
    ]
    assert tensorboard_scalars(tmp_path / "tensorboard") == {"loss": [(1, 2.0), (2, 2.0)]}


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file is in the way")
    tracker = TensorBoardSpec().start(tmp_path, "name", {})
    tracker.log({"step": 1, "loss": 2.0}, 1)
    tracker.finish({"step": 1})
    assert len(caplog.records) == 1 and "tensorboard failed and is left out" in caplog.text


def test_automatic_mode(monkeypatch):
    module = fake_wandb(monkeypatch, [])
    assert _reachable_mode(module) == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert _reachable_mode(module) == "disabled"


class Holder(Spec):
    tracker: OneOf[TrackerSpec]


def test_faults():
    with pytest.raises(ConfigError, match="tracker.kind: unknown tracker kind 'wanb'; did you mean 'wandb'"):
        validate(Holder, {"tracker": {"kind": "wanb"}})
    with pytest.raises(ConfigError, match=r"tracker.trackers.board.kind: unknown tracker kind 'tensorbord'; did you"):
        validate(Holder, {"tracker": {"kind": "several", "trackers": {"board": {"kind": "tensorbord"}}}})
    with pytest.raises(ConfigError, match="tracker.mode: 'onlin' is not valid; did you mean 'online'"):
        validate(Holder, {"tracker": {"kind": "wandb", "mode": "onlin"}})


def test_offline_under_the_run_directory_and_nowhere_else(tmp_path):
    """The real library, without key and network, in a process of its own: it starts threads and a service."""
    home, run, elsewhere = tmp_path / "home", tmp_path / "run", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"HOME": str(home), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", OFFLINE, str(run)]
    done = subprocess.run(command, env=environment, cwd=elsewhere, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "failed" not in done.stderr, done.stderr
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    records = [wandb_records(file) for file in files]
    rows = [
        {
            item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for session in records
        for record in session
        if record.HasField("history")
    ]
    trained = [(row["step"], row["tokens"], row["loss"]) for row in rows if "loss" in row]
    assert trained == [(step, 4 * step, 5.0 - step) for step in range(1, 6)]  # Steps 2 and 3 were not sent twice.
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 5]
    runs = [record.run for session in records for record in session if record.HasField("run")]
    assert {each.run_id for each in runs} == {(run / "wandb_run_id").read_text()}
    assert (runs[0].display_name, runs[0].run_group, runs[0].project) == ("small", "tests", "efficient-lm")
    assert os.listdir(elsewhere) == []
    assert json.dumps(sorted(os.listdir(run))) == '["wandb", "wandb_run_id"]'
