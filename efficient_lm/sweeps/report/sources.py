"""Which runs a report is of: run directories, folders of them, sweeps, patterns."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efficient_lm.errors import ConfigError, nearest
from efficient_lm.untrusted import JSON_BYTES, parse_json, read_bytes

SIGNS = ("config.yaml", "metrics.jsonl", "summary.json")
"""Files of which a run directory has at least one."""
TABLE = "table.json"
SWEEP_SIGNS = (TABLE, "sweep.yaml")


@dataclass(frozen=True)
class Found:
    """A run that is to be reported.

    Attributes:
        path: its directory, which need not be there.
        row: what the table of its sweep says of it; empty outside a sweep.
        sweep: the sweep's name, or empty.
        metric: by which the sweep judges, or empty.
    """

    path: Path
    row: dict[str, Any] = field(default_factory=dict)
    sweep: str = ""
    metric: str = ""


@dataclass(frozen=True)
class Sources:
    """All runs, each once.

    Attributes:
        folders: those that were named and hold runs.
        notes: what is wrong with the sweeps themselves.
        metrics: by which the sweeps judge, the first one's first.
    """

    runs: tuple[Found, ...]
    folders: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()


def find(named: Sequence[str]) -> Sources:
    """The runs below what was named: run directories, folders of runs, sweeps, or patterns of such.

    Raises:
        ConfigError: a folder that is not there or has no run in it; a pattern that finds none.
    """
    runs: dict[Path, Found] = {}
    folders: list[Path] = []
    notes: list[str] = []
    for text in named:
        pattern = glob.has_magic(text) and not Path(text).exists()
        paths = [Path(found) for found in sorted(glob.glob(text))] if pattern else [Path(text)]
        before = len(runs)
        for path in paths:
            found = list(_below(path, notes))
            if found:
                folders.append(path)
            elif not pattern:
                raise ConfigError(_fault(path))
            for run in found:
                place = run.path.resolve()
                if place not in runs or (run.sweep and not runs[place].sweep):
                    runs[place] = run
        if pattern and len(runs) == before and not any(list(_below(path, [])) for path in paths):
            raise ConfigError(f"runs={text}: no run in {len(paths)} folders that it matches; {_wanted()}")
    metrics = dict.fromkeys(found.metric for found in runs.values() if found.metric)
    return Sources(tuple(runs.values()), tuple(folders), tuple(dict.fromkeys(notes)), tuple(metrics))


def _below(path: Path, notes: list[str]) -> Iterator[Found]:
    """The runs of one place; none if it holds none."""
    if is_sweep(path):
        yield from _of_sweep(path, notes)
    elif is_run(path):
        yield Found(path)
    elif path.is_dir():
        for inner in sorted(path.iterdir()):
            if is_sweep(inner):
                yield from _of_sweep(inner, notes)
            elif is_run(inner):
                yield Found(inner)


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory, whole or not."""
    return any((path / name).is_file() for name in SIGNS) or (path / "checkpoints").is_dir()


def is_sweep(path: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return any((path / name).is_file() for name in SWEEP_SIGNS)


def _of_sweep(path: Path, notes: list[str]) -> Iterator[Found]:
    name = path.absolute().name
    try:
        table = parse_json(read_bytes(path / TABLE, JSON_BYTES, ConfigError))
        rows = table.get("rows") if isinstance(table, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it lists no rows")
    except (OSError, ValueError, ConfigError) as error:
        why = "there is none" if isinstance(error, FileNotFoundError) else str(error).removeprefix(f"{path / TABLE}: ")
        notes.append(f"{path / TABLE}: {why}; what the runs differ in is read from their configs")
        yield from (Found(inner) for inner in sorted((path / "runs").glob("*")) if is_run(inner))
        return
    for row in rows:
        given = row.get("run", row.get("directory"))
        place = path / str(given)
        if not isinstance(given, str) or not given or not place.resolve().is_relative_to(path.resolve()):
            # A table may come from anyone: it does not say what else is read here.
            fault = "its directory is not inside the sweep's folder, and is not read"
            row, place = {**row, "reason": row.get("reason") or fault}, path / "runs" / "-"
        yield Found(place, row, name, str(table.get("metric") or ""))


def _fault(path: Path) -> str:
    if not path.exists():
        beside = [str(each) for each in path.parent.glob("*")] if path.parent.is_dir() else []
        hint = f"; {nearest(path, beside, 5)}" if beside else ""
        return f"runs: {path}: no such folder{hint}"
    return f"runs: {path}: {'no run in it' if path.is_dir() else 'not a folder'}; {_wanted()}"


def _wanted() -> str:
    return f"a run directory has {', '.join(SIGNS)}; a sweep has {TABLE}"
