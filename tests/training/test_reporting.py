"""metrics.jsonl across resumption, the console, the plot, atomic writes."""

import io
import json
import os

import pytest

from efficient_lm.errors import CheckpointError
from efficient_lm.training.reporting import (
    Console,
    MetricsFile,
    plot_loss,
    read_metrics,
    write_atomically,
    write_json_atomically,
)


def fill(folder, steps):
    metrics = MetricsFile(folder)
    for step in steps:
        metrics.append({"step": step, "loss": 5.0 / step})
    metrics.close()
    return metrics.path


def test_rows_are_on_disk_as_soon_as_they_are_appended(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.append({"step": 1, "loss": float("nan"), "bound": float("inf")})
    assert json.loads(metrics.path.read_text()) == {"step": 1, "loss": None, "bound": None}


def test_resuming_drops_what_will_come_again_and_a_torn_line(tmp_path):
    path = fill(tmp_path, range(1, 8))
    with path.open("a") as file:
        file.write('{"step": 8, "lo')
    metrics = MetricsFile(tmp_path)
    metrics.resume(5)
    metrics.append({"step": 6, "loss": 9.0})
    metrics.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert path.read_text().count("\n") == 6 and read_metrics(tmp_path)[-1]["loss"] == 9.0
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_starting_afresh_leaves_no_old_rows(tmp_path):
    fill(tmp_path, [1, 2])
    MetricsFile(tmp_path).resume(0)
    assert read_metrics(tmp_path) == []


def test_resuming_without_a_file_writes_none(tmp_path):
    MetricsFile(tmp_path).resume(3)
    assert os.listdir(tmp_path) == []


def test_any_other_bad_line_is_named(tmp_path):
    path = fill(tmp_path, [1, 2])
    path.write_text(path.read_text().replace('{"step": 1', '{"step" 1'))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:1: not a JSON object"):
        read_metrics(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_metrics(tmp_path / "none")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json_atomically(path, {"a": [1.5, float("nan")], "b": (1, 2)})
    assert json.loads(path.read_text()) == {"a": [1.5, None], "b": [1, 2]}
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.json"]


def test_plain_lines_where_there_is_no_terminal(capsys):
    console = Console(total_steps=100, start_step=40)
    console.show({"step": 50, "loss": 3.25, "tokens_per_second": 12345.6})
    console.show({"step": 50, "val_loss": 3.5, "val_bits_per_byte": 1.61})
    console.show({"step": 60, "loss": None, "tokens_per_second": 10.0})
    console.message("[bold] is text, not markup")
    console.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 50/100  loss 3.2500  12,346 tokens/s  ") and lines[0].endswith(" left")
    assert lines[1] == "step 50: validation loss 3.5000, bits per byte 1.6100"
    assert "loss not a number" in lines[2] and lines[3] == "[bold] is text, not markup"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    console = Console(total_steps=100)
    console.show({"step": 50, "loss": 3.25, "tokens_per_second": 12345.6})
    console.close()
    shown = screen.getvalue()
    assert " 50/100" in shown and "3.2500" in shown and "12,346 tokens/s" in shown and "left" in shown


def test_the_plot_is_a_picture(tmp_path):
    metrics = MetricsFile(tmp_path)
    for step in range(1, 50):
        metrics.append({"step": step, "loss": 8 / step**0.3 if step != 7 else None})
        if step % 10 == 0:
            metrics.append({"step": step, "val_loss": 8.2 / step**0.3, "val_bits_per_byte": 3 / step**0.3})
    metrics.close()
    path = plot_loss(tmp_path)
    assert path == tmp_path / "plots" / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert os.listdir(path.parent) == ["loss.png"]


def test_nobody_has_to_read_what_a_run_prints(monkeypatch):
    end, begin = os.pipe()
    os.close(end)
    with open(begin, "w", buffering=1) as gone, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", gone)
        console = Console(10)
        console.show({"step": 1, "loss": 2.0})
        assert console._console.quiet, "what nobody reads is not printed again"
        console.show({"step": 2, "loss": 2.0})
        console.close()
        # What nobody took is not tried again when the file is closed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), begin)
