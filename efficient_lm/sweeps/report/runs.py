"""Runs as their directories tell of them. What is missing or torn is said, and never a reason to stop."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from efficient_lm.errors import UserError
from efficient_lm.sweeps.report.measures import ALIASES, VALIDATION
from efficient_lm.sweeps.report.sources import Found
from efficient_lm.training.reporting import METRICS_FILE, scanned, smoothed
from efficient_lm.untrusted import CONFIG_BYTES, JSON_BYTES, parse_json, parse_yaml, read_bytes

POINTS, LEAST, ALL = 120, 30, 25_000
"""Of a curve, at most about so many are kept; of many runs fewer, until of all together so many."""
METRICS_BYTES = 1 << 30
"""Of a file of rows; a million rows have some 600 MB."""
SUMMARY = "summary.json"
RATE = "optimizer.learning_rate"
ON_PURPOSE = ("train.stop_at", "train.minutes")
"""Ends that the config asked for."""
ENDED = ("finished", "stopped")
"""States of runs that got as far as they should, and are compared."""

Columns = dict[str, np.ndarray]
"""Measure → float64 ``[points]``."""


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        path: its directory.
        name: for people.
        state: ``finished``, ``stopped`` (on purpose), ``interrupted``, ``diverged``, ``unfinished``, or what its sweep
            calls it.
        faults: what is missing, torn or went wrong, a phrase each.
        config: dotted key → value, as composed; empty if it cannot be read.
        choices: of its sweep, axis → value; None outside a sweep.
        seed, learning_rate: None if not known.
        training, validation: curves along ``tokens`` and ``seconds``; the training loss smoothed, both thinned out.
        figures: at its end.
        sizes: of the models nested in it, the smallest first: what it is called → its figures.
        sweep: name of its sweep, or empty.
    """

    path: Path
    name: str
    state: str
    faults: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, Any] | None = None
    seed: int | None = None
    learning_rate: float | None = None
    training: Columns = field(default_factory=dict)
    validation: Columns = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    sweep: str = ""

    @property
    def ended(self) -> bool:
        """Whether it got as far as it should."""
        return self.state in ENDED


def read_all(found: Sequence[Found]) -> list[Run]:
    """All runs, with curves of as many points as a page can hold."""
    points = min(POINTS, max(LEAST, ALL // max(len(found), 1)))
    return [read(one, points) for one in found]


def read(found: Found, points: int = POINTS) -> Run:
    """A run as its directory, and the table of its sweep, tell of it; never fails for what is in them."""
    faults: list[str] = []
    config: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    if found.path.is_dir():
        config = _config(found.path, faults)
        if any((found.path / name).exists() for name in (METRICS_FILE, SUMMARY)):
            rows, summary = _rows(found.path, faults), _summary(found.path, faults)
        else:
            faults.append(f"neither {METRICS_FILE} nor {SUMMARY}: nothing was trained here, or it was killed early")
    else:
        faults.append("not begun" if found.row.get("state") == "waiting" else "its directory is missing")
    training, validation = _training(rows), _validation(rows)
    choices = found.row.get("choices") if isinstance(found.row.get("choices"), dict) else None
    state = _state(found.row, rows, summary, config, faults)
    seed, rate = found.row.get("seed"), config.get(RATE, (choices or {}).get(RATE))
    seed = config.get("run.seed") if seed is None else seed
    name = found.row.get("name") or config.get("run.name") or found.path.absolute().name
    return Run(
        path=found.path,
        name=str(name),
        state=state,
        faults=tuple(dict.fromkeys(faults)),
        config=config,
        choices=choices if found.sweep else None,
        seed=seed if isinstance(seed, int) else None,
        learning_rate=_number(rate),
        training=_thinned(training, points),
        validation=_thinned(validation, points),
        figures=_figures(found.row, rows, summary, training),
        sizes=_sizes(summary),
        sweep=found.sweep,
    )


def _config(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        return flat(_sections(read_bytes(path / "config.yaml", CONFIG_BYTES).decode()))
    except FileNotFoundError:
        faults.append("no config.yaml")
    except (OSError, ValueError, UserError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f":{mark.line + 1}"
        faults.append(f"config.yaml{where}: cannot be read: {getattr(error, 'problem', None) or _short(error, path)}")
    return {}


def _sections(text: str) -> dict[str, Any]:
    """A config, of which each section is parsed once, in however many runs it is the same."""
    parts = re.split(r"^(?=[A-Za-z_]\w*:)", text, flags=re.MULTILINE)
    try:
        sections = [_section(part) for part in parts if part]
    except (ValueError, yaml.YAMLError):
        sections = []
    merged = {name: value for section in sections for name, value in section.items()}
    if sections and len(merged) == sum(map(len, sections)):
        return merged
    # Written by something else than a run: as a whole, and with whatever is wrong with it.
    values = parse_yaml(text)
    if not isinstance(values, dict):
        raise ValueError("holds no mapping")
    return values


@lru_cache(maxsize=4096)
def _section(text: str) -> dict[str, Any]:
    values = parse_yaml(text)
    if not isinstance(values, dict):
        raise ValueError("no mapping")
    return values


def _rows(path: Path, faults: list[str]) -> list[dict[str, Any]]:
    try:
        found = scanned(read_bytes(path / METRICS_FILE, METRICS_BYTES))
    except FileNotFoundError:
        faults.append(f"no {METRICS_FILE}")
        return []
    except (OSError, UserError) as error:
        faults.append(f"{METRICS_FILE}: cannot be read: {_short(error, path)}")
        return []
    if found.bad:
        more = f" and {len(found.bad) - 1} more" if len(found.bad) > 1 else ""
        faults.append(f"{METRICS_FILE}: line {found.bad[0]}{more} is no JSON object and is left out")
    if found.torn:
        faults.append(f"the last line of {METRICS_FILE} is torn and is left out")
    if not found.rows:
        faults.append(f"{METRICS_FILE} has no row")
    return found.rows


def _summary(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        summary = parse_json(read_bytes(path / SUMMARY, JSON_BYTES))
        if not isinstance(summary, dict):
            raise ValueError("not an object")
        return summary
    except FileNotFoundError:
        faults.append(f"no {SUMMARY}: still running, or killed")
    except (OSError, ValueError, UserError) as error:
        faults.append(f"{SUMMARY}: cannot be read: {_short(error, path)}")
    return {}


def _state(
    row: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    faults: list[str],
) -> str:
    steps = config.get("train.steps")
    at = f" at step {summary.get('step')}" + (f" of {steps}" if steps else "")
    losses = [each for each in rows if "loss" in each]
    if not summary:
        diverged = bool(losses) and _number(losses[-1]["loss"]) is None
        if diverged:
            faults.append(f"the loss is no number at step {losses[-1].get('step')}")
        state = "diverged" if diverged else "unfinished"
    elif "stopped_by" in summary:
        state = "stopped" if summary["stopped_by"] in ON_PURPOSE else "interrupted"
        faults.append(f"stopped by {summary['stopped_by']}{at}")
    else:
        state = "finished"
    if row.get("reason"):
        faults.append(" ".join(str(row["reason"]).split()))
    said = row.get("state")
    # A sweep knows of failures, and of runs that wait; what a directory says of its end is more exact.
    return state if not isinstance(said, str) or (said == "finished" and summary) else said


def _figures(
    row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], training: Columns
) -> dict[str, float]:
    given = row.get("figures") if isinstance(row.get("figures"), dict) else {}
    found = {ALIASES.get(name, name): value for name, value in given.items()}
    # Of a run that has not ended both are what was planned.
    done = summary if "training_flops" in summary else found
    flops, tokens = _number(done.get("training_flops")), _number(done.get("tokens"))
    for name in ("step", "tokens", "seconds", "device_memory_peak_bytes", *(each.name for each in VALIDATION)):
        last = next((each[name] for each in reversed(rows) if each.get(name) is not None), None)
        found |= {} if last is None else {name: last}
    found |= {name: value for name, value in summary.items() if value is not None}
    if training.get("loss") is not None and len(training["loss"]):
        found["loss"] = float(training["loss"][-1])
    speeds = [speed for each in rows if (speed := _number(each.get("tokens_per_second")))]
    if speeds:
        found["tokens_per_second"] = float(np.median(speeds))
    numbers = {name: number for name, value in found.items() if (number := _number(value)) is not None}
    if flops is not None and tokens is not None and tokens > 0:
        numbers["training_flops_per_token"] = flops / tokens
    return numbers


def _sizes(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Cost and quality of every size of a run with nested ones; the whole model has figures without a name behind."""
    found = {}
    entries = summary.get("sizes") if isinstance(summary.get("sizes"), list) else []
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(name := entry.get("size"), str):
            continue
        ending = "" if place == len(entries) - 1 else f"_{name}"
        figures = {cost: entry.get(cost) for cost in ("parameters", "flops_per_token")}
        figures |= {measure.name: summary.get(f"{measure.name}{ending}") for measure in VALIDATION}
        found[name] = {key: number for key, value in figures.items() if (number := _number(value)) is not None}
    return found


def _training(rows: Sequence[Mapping[str, Any]]) -> Columns:
    steps = [row for row in rows if _number(row.get("loss")) is not None]
    found = _columns(steps, ("tokens", "seconds", "loss"))
    return found | {"loss": np.array(smoothed(found["loss"].tolist()))} if len(steps) else {}


def _validation(rows: Sequence[Mapping[str, Any]]) -> Columns:
    """Of evaluations while training; the last one, of all rows, stands for itself if it is the only one."""
    scored, seconds = [], None
    for row in rows:
        seconds = row.get("seconds", seconds)
        if any(measure.name in row for measure in VALIDATION):
            scored.append({**row, "seconds": row.get("seconds", seconds)})
    during = [row for row in scored if not row.get("final")] or scored
    if not during:
        return {}
    names = [measure.name for measure in VALIDATION if any(measure.name in row for row in during)]
    return _columns(during, ("tokens", "seconds", *names))


def _columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Columns:
    def value(row: Mapping[str, Any], name: str) -> float:
        number = _number(row.get(name))
        return math.nan if number is None else number

    return {name: np.array([value(row, name) for row in rows], float) for name in names}


def _thinned(columns: Columns, points: int) -> Columns:
    """Some of the points, the first and last among them: most of them evenly, and more of the early ones."""
    count = len(next(iter(columns.values()), ()))
    if count <= points:
        return columns
    even, early = np.linspace(0, count - 1, points * 3 // 4), np.geomspace(1, count, points // 4) - 1
    kept = np.unique(np.concatenate([even, early]).round().astype(int))
    return {name: values[kept] for name, values in columns.items()}


def flat(values: Any, path: str = "") -> dict[str, Any]:
    """Dotted key → scalar or list, of a plain config."""
    if isinstance(values, dict) and values:
        inner = [flat(value, f"{path}.{name}".lstrip(".")) for name, value in values.items()]
        return {key: value for part in inner for key, value in part.items()}
    return {path: values} if path else {}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _short(error: Exception, path: Path) -> str:
    """The first line of what is wrong, without the folder, which stands beside it."""
    return (str(error).splitlines() or [type(error).__name__])[0].replace(f"{path}/", "")
