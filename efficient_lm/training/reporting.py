"""What a run tells people: metrics.jsonl, a progress bar or plain lines, and a plot of the loss."""

import contextlib
import io
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from efficient_lm.errors import CheckpointError, ResourceError, storage_fault

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
SMOOTHING = 0.8
"""Weight of the past in the smoothed training loss of the plot."""


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all: beside its place first, then by renaming."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json_atomically(path: str | Path, value: Any) -> None:
    """Write JSON, indented; numbers that are not finite become null."""
    write_atomically(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """A JSON value with null in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile:
    """`metrics.jsonl`, or another: one JSON object per row, on disk as soon as it is appended."""

    def __init__(self, run_dir: str | Path, name: str = METRICS_FILE):
        self.path = Path(run_dir) / name
        self._file: Any = None
        self._end = 0
        self._waiting = b""
        self._refused = False

    def resume(self, step: int, belongs: Callable[[dict[str, Any]], bool] = lambda row: True) -> list[dict]:
        """Drop rows beyond `step` and those that do not belong, and a torn last line; gives back the rows."""
        return self._keep(lambda row: row.get("step", 0) <= step and belongs(row))

    def cut_after(self, step: int) -> list[dict[str, Any]]:
        """Drop rows beyond `step`, and give them back."""
        self.settle()
        self.close()
        return self._keep(lambda row: row.get("step", 0) <= step)

    def append(self, row: dict[str, Any]) -> None:
        """Write one row. Where the disk refuses, it is kept and written with the next; `settle` insists."""
        self._waiting += _line(row).encode()
        try:
            self.settle()
        except ResourceError as error:
            if not self._refused:
                log.warning("%s; training goes on, and rows wait in memory", error)
            self._refused = True

    def settle(self) -> None:
        """Write what waits. Raises `ResourceError`."""
        try:
            if self._file is None and self._waiting:
                self._file = open(self.path, "ab", buffering=0)
                self._end = self._file.seek(0, os.SEEK_END)
            if self._waiting:
                # What an attempt left half written is written over.
                self._file.truncate(self._end)
                written = 0
                while written < len(self._waiting):
                    written += self._file.write(self._waiting[written:])
                self._end, self._waiting, self._refused = self._end + written, b"", False
        except OSError as error:
            raise ResourceError(f"{self.path}: cannot be written: {storage_fault(error) or error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(ResourceError):
            self.settle()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Leave the rows that are wanted in the file, and give back the others."""
        if not self.path.exists():
            return []
        rows = read_metrics(self.path.parent, self.path.name)
        kept = [wanted(row) for row in rows]
        write_atomically(self.path, "".join(_line(row) for row, keep in zip(rows, kept, strict=True) if keep))
        return [row for row, keep in zip(rows, kept, strict=True) if not keep]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(finite(row), allow_nan=False) + "\n"


class Scanned(NamedTuple):
    """What a file of rows holds.

    Attributes:
        torn: whether its last line broke off.
        bad: numbers of other lines that are no JSON object.
    """

    rows: list[dict[str, Any]]
    torn: bool
    bad: list[int]


def scanned(content: bytes) -> Scanned:
    """The rows of `metrics.jsonl`, or another file like it, and which lines are none."""
    lines = content.split(b"\n")
    rows, bad = _at_once(lines), []
    if rows is not None:
        return Scanned(rows, False, [])
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
            if not isinstance(row, dict | None):
                raise ValueError("not an object")
        except (ValueError, RecursionError):
            bad.append(number)
            continue
        if row is not None:
            rows.append(row)
    torn = bad[-1:] == [len(lines)]
    return Scanned(rows, torn, bad[:-1] if torn else bad)


def _at_once(lines: list[bytes]) -> list[dict[str, Any]] | None:
    """Rows that are all whole, in a third of the time that a line by itself takes; None where one is not."""
    filled = [line for line in lines if line.strip()]
    try:
        rows = json.loads(b"[" + b",".join(filled) + b"]")
    except (ValueError, RecursionError):
        return None
    return rows if len(rows) == len(filled) and all(isinstance(row, dict) for row in rows) else None


def read_metrics(run_dir: str | Path, name: str = METRICS_FILE) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`, without a torn last line. Raises `CheckpointError` for any other bad line."""
    path = Path(run_dir) / name
    try:
        found = scanned(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if found.bad:
        raise CheckpointError(f"{path}:{found.bad[0]}: not a JSON object")
    return found.rows


class Console:
    """Progress for people: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, total_steps: int, start_step: int = 0):
        from efficient_lm.terminal import console

        self.total, self.start = total_steps, start_step
        self._began = time.monotonic()
        self._console = console(highlight=False, soft_wrap=True)
        self._bar = _bar(self._console) if self._console.is_terminal else None
        if self._bar is not None:
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, loss="", speed="", left="")
            self._bar.start()

    def show(self, row: dict[str, Any]) -> None:
        """A row of `metrics.jsonl`: of training, or of validation (with `val_loss`)."""
        if "val_loss" in row:
            self.message(f"step {row['step']}: validation " + _validation(row))
        elif self._bar is not None:
            self._bar.update(self._task, completed=row["step"], **self._figures(row))
        else:
            figures = self._figures(row)
            parts = [
                f"step {row['step']}/{self.total}",
                f"loss {figures['loss']}",
                figures["speed"],
                f"{figures['left']} left",
            ]
            self.message("  ".join(part for part in parts if part))

    def message(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        try:
            self._console.print(text, markup=False)
        except (OSError, SystemExit):
            # Nobody reads any more (rich would end the process), or a log's disk is full: no reason to stop training.
            self._console.quiet = True

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

    def _figures(self, row: dict[str, Any]) -> dict[str, str]:
        loss, speed = row.get("loss"), row.get("tokens_per_second")
        return {
            "loss": "not a number" if loss is None else f"{loss:.4f}",
            "speed": f"{speed:,.0f} tokens/s" if speed else "",
            "left": self._left(row["step"]),
        }

    def _left(self, step: int) -> str:
        """Time left at the average pace of this session."""
        done = step - self.start
        return _duration((self.total - step) * (time.monotonic() - self._began) / done) if done > 0 else "?"


def _bar(console: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("loss [bold]{task.fields[loss]}"),
        TextColumn("[cyan]{task.fields[speed]}"),
        TextColumn("[dim]{task.fields[left]} left"),
        console=console,
        expand=True,
    )


def _validation(row: dict[str, Any]) -> str:
    names = {
        "val_loss": "loss",
        "val_bits_per_byte": "bits per byte",
        "val_accuracy": "accuracy",
        "val_sequence_accuracy": "whole rows",
    }
    return ", ".join(f"{shown} {row[name]:.4f}" for name, shown in names.items() if row.get(name) is not None)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plot_loss(run_dir: str | Path) -> Path:
    """Draw `plots/loss.png`: training loss, raw and smoothed, and validation loss, which the right axis has in bits per
    byte."""
    rows = read_metrics(run_dir)
    axes = empty_plot("step", "loss (nats per token)", Path(run_dir).absolute().name)
    steps, loss = _series(rows, "loss")
    axes.plot(steps, loss, color="#4c72b0", alpha=0.3, linewidth=0.8)
    axes.plot(steps, smoothed(loss), color="#4c72b0", linewidth=1.8, label="training (smoothed)")
    _plot_validation(axes, rows)
    axes.legend(frameon=False)
    return save_plot(axes, Path(run_dir) / "plots" / "loss.png")


def empty_plot(across: str, up: str, title: str) -> Any:
    """The axes of a new figure in the house's style, with labels for what goes across and up."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_title(title, loc="left", fontweight="bold")
    return axes


def save_plot(axes: Any, path: Path) -> Path:
    """Write a figure as a PNG at `path`, whole or not at all."""
    from PIL import Image  # which Matplotlib needs itself

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    axes.figure.savefig(drawn, format="png")
    # A palette takes a quarter of the bytes, and lines and letters have few colours.
    palette = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    palette.save(path.with_suffix(".tmp"), format="png", optimize=True)
    os.replace(path.with_suffix(".tmp"), path)
    return path


def _plot_validation(axes: Any, rows: list[dict[str, Any]]) -> None:
    steps, loss = _series(rows, "val_loss")
    if not loss:
        return
    bits = _series(rows, "val_bits_per_byte")[1]
    _plot_accuracy(axes, *_series(rows, "val_accuracy"))
    label = f"validation (at last {bits[-1]:.3f} bits per byte)" if bits else "validation"
    axes.plot(steps, loss, color="#dd8452", marker="o", markersize=4, linewidth=1.5, label=label)
    if bits:
        # Bits per byte is the loss times tokens per byte, so one curve can be read on both axes.
        factor = bits[-1] / loss[-1]
        right = axes.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))
        right.set_ylabel("validation bits per byte")


def _plot_accuracy(axes: Any, steps: list[int], accuracy: list[float]) -> None:
    """The accuracy of a synthetic task, on an axis of its own."""
    if not accuracy:
        return
    right = axes.twinx()
    right.spines["top"].set_visible(False)
    right.set_ylim(0, 1.02)
    right.set_ylabel("validation accuracy")
    right.plot(steps, accuracy, color="#55a868", marker="s", markersize=3, linewidth=1.2)


def _series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def smoothed(values: list[float]) -> list[float]:
    """Mean of an exponential moving average forwards and one backwards, which has no lag."""
    forwards, backwards = _averaged(values), _averaged(values[::-1])[::-1]
    return [(one + other) / 2 for one, other in zip(forwards, backwards, strict=True)]


def _averaged(values: list[float]) -> list[float]:
    """Exponential moving average, corrected for its start at zero."""
    averages, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        averages.append(average / (1 - SMOOTHING**count))
    return averages
