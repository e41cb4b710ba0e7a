"""Whether the rows of `metrics.jsonl` are those of a run that was never disturbed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from efficient_lm.config import RunConfig
from efficient_lm.training.reporting import METRICS_FILE, read_metrics
from efficient_lm.verification.findings import Finding, State

SHOWN = 5


def training_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of steps and of evaluations; none if there is no file. Raises `CheckpointError` for a bad line."""
    return read_metrics(run) if (run / METRICS_FILE).exists() else []


def check_rows(run: Path, config: RunConfig, records: dict[int, dict[str, Any]]) -> Iterator[Finding]:
    """Whole lines, steps and tokens that ascend, none missing, up to the newest checkpoint.

    Args:
        run: the run directory.
        records: those of the checkpoints, by step.
    """
    rows = training_rows(run)
    steps = [row for row in rows if "loss" in row]
    if not steps:
        yield Finding("metrics", State.WARNING, "there is no row of a step")
        return
    text = (run / METRICS_FILE).read_bytes()
    if not text.endswith(b"\n"):
        yield Finding("metrics", State.WARNING, "the last line is torn; it is dropped when the run goes on")
    disorder = _disorder(steps)
    if disorder is not None:
        yield Finding("metrics", State.FAULT, disorder)
        return
    yield from _gaps([row["step"] for row in steps], config, max(records, default=0))
    lost = [row["step"] for row in steps if row["loss"] is None]
    if lost:
        yield Finding("metrics", State.WARNING, f"the loss was no number at {_some(lost)}; those steps changed nothing")
    first, last = steps[0]["step"], steps[-1]["step"]
    yield Finding("metrics", State.OK, f"{len(rows):,} rows, steps {first:,} to {last:,}, in order")


def _disorder(rows: list[dict[str, Any]]) -> str | None:
    for before, row in zip(rows, rows[1:], strict=False):
        if row["step"] <= before["step"]:
            return f"step {row['step']} comes after step {before['step']}"
        if row["tokens"] < before["tokens"]:
            return f"tokens fall from {before['tokens']:,} to {row['tokens']:,} at step {row['step']}"
    return None


def _gaps(steps: list[int], config: RunConfig, newest: int) -> Iterator[Finding]:
    """Steps that should have been logged, by `train.log_every` as it is now."""
    every, begins = config.train.log_every, config.init_state == "all"
    first = steps[0] if begins else 1
    due = {step for step in range(first, max(steps[-1], newest) + 1) if step % every == 0} | {first}
    missing = sorted(due - set(steps))
    if missing:
        hint = "unless train.log_every was changed on the way, they were lost"
        yield Finding("metrics", State.WARNING, f"there is no row of {_some(missing)}: {hint}")


def _some(steps: list[int]) -> str:
    named = ", ".join(map(str, steps[:SHOWN]))
    more = f" and {len(steps) - SHOWN} more" if len(steps) > SHOWN else ""
    return f"{'step' if len(steps) == 1 else 'steps'} {named}{more}"
