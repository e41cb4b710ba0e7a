"""The runs of an evidence. Each has a folder of its own and is finished once; the same command goes on where it was
stopped."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efficient_lm.config import RunConfig, load_run_config
from efficient_lm.errors import ConfigError, UserError
from efficient_lm.evidence.measures.base import MeasureSpec
from efficient_lm.evidence.page import page
from efficient_lm.evidence.spec import EvidenceSpec, read_evidence
from efficient_lm.runtime import surroundings
from efficient_lm.training.reporting import write_atomically, write_json_atomically

log = logging.getLogger(__name__)

KEPT = "evidence.json"
"""In each run's folder: what was measured, once it is finished."""
RESULTS = Path("docs/results")


def gather(name: str, arguments: Sequence[str] = ()) -> bool:
    """Do what is left of an evidence's runs and write its page; False if any of them failed.

    Raises:
        ConfigError: no such evidence, or a run that cannot be composed; nothing was run then.
    """
    spec = read_evidence(name, arguments)
    folder = Path(spec.runs) / name
    cells = [(point, arm) for point in spec.points() for arm in spec.measured]
    for point, arm in cells:
        run_config(spec, folder, point, arm, None, spec.seeds[0])
    rows: list[dict[str, Any]] = []
    for point, arm in cells:
        beside = next((row for row in rows if _is_beside(row, spec, point, arm)), None)
        rows.append(_cell(spec, folder, point, arm, beside))
    facts = surroundings("efficient-lm", "jax", "jaxlib", "flax", "numpy")
    output = Path(spec.output) if spec.output else RESULTS
    output.mkdir(parents=True, exist_ok=True)
    write_json_atomically(output / f"{name}.json", {**facts, "evidence": spec.dump(), "rows": rows})
    drawn = spec.measure.picture and spec.measure.picture(rows, output / f"{name}.png", _title(name))
    write_atomically(output / f"{name}.md", page(_title(name), name, spec, rows, facts, drawn and drawn.name))
    log.info("written: %s", output / f"{name}.md")
    return all("error" not in run for row in rows for run in row["runs"])


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _is_beside(row: Mapping[str, Any], spec: EvidenceSpec, point: Mapping[str, Any], arm: str) -> bool:
    """Whether a row is of the arm, at this point, that others are measured beside."""
    return row["arm"] == spec.measure.reads != arm and all(row[key] == value for key, value in point.items())


def _cell(
    spec: EvidenceSpec, folder: Path, point: Mapping[str, Any], arm: str, beside: Mapping[str, Any] | None
) -> dict[str, Any]:
    """An arm at a point: the learning rates with the first seed, then the best one with the others."""

    def run(rate: float | None, seed: int) -> dict[str, Any]:
        return _run(spec, run_config(spec, folder, point, arm, rate, seed), rate, seed, beside)

    first, *others = spec.seeds
    tried = [run(rate, first) for rate in spec.learning_rates or (None,)]
    good = [each for each in tried if "error" not in each]
    if not good:
        return {"arm": arm, **point, "learning_rate": None, "tried": tried, "runs": tried[:1]}
    best = max(good, key=lambda each: spec.measure.quality(each["figures"]))
    runs = [best, *(run(best["rate"], seed) for seed in others)]
    return {"arm": arm, **point, "learning_rate": best["learning_rate"], "tried": tried, "runs": runs}


def run_config(
    spec: EvidenceSpec, folder: Path, point: Mapping[str, Any], arm: str, rate: float | None, seed: int
) -> RunConfig:
    """The config of one run, whose folder is below `folder`. Raises `ConfigError` if it cannot be composed."""
    parts = {"arm": arm, **point, **({"rate": rate} if rate is not None else {}), "seed": seed}
    name = "-".join(f"{value}" if key == "arm" else f"{key.split('.')[-1]}{value}" for key, value in parts.items())
    given = [*spec.overrides, *spec.arms[arm], *(f"{key}={value}" for key, value in point.items())]
    given += [f"run.seed={seed}", f"run.name='{name}'", f"run.dir='{folder / name}'"]
    return load_run_config([*given, *([] if rate is None else [f"optimizer.learning_rate={rate}"])])


def _run(
    spec: EvidenceSpec, config: RunConfig, rate: float | None, seed: int, beside: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What one run measured; a fault is part of the answer, and the other runs go on."""
    try:
        other = None if beside is None else _of_seed(beside, seed)
        return {"seed": seed, "rate": rate} | measured(config, spec.measure, other)
    except Exception as error:
        log.error("%s: %s", config.run.name, error, exc_info=None if isinstance(error, UserError) else error)
        return {"seed": seed, "rate": rate, "error": (str(error).splitlines() or [type(error).__name__])[0]}


def _of_seed(row: Mapping[str, Any], seed: int) -> Path:
    """The folder of a row's run with that seed."""
    found = next((run for run in row["runs"] if run["seed"] == seed and "error" not in run), None)
    if found is None:
        raise ConfigError(f"the run of {row['arm']} with seed {seed} failed, beside which this one is measured")
    return Path(found["folder"])


def measured(config: RunConfig, measure: MeasureSpec, other: Path | None = None) -> dict[str, Any]:
    """Train, or go on, and measure; what is kept in the run's folder is taken from there.

    Args:
        other: the folder of the run that this one is measured beside; None if it is by itself.

    Returns:
        `folder`, `steps`, `seconds` (wall time, compiling and evaluation included), `parameters`, `learning_rate`,
        `figures` and what these were made of.

    Raises:
        ConfigError: the folder holds a finished run of another config.
        KeyboardInterrupt: a signal stopped the run; it can go on.
    """
    import jax

    from efficient_lm.training.loop import train

    run = Path(config.run.dir)
    beside = None if other is None else json.loads((other / KEPT).read_text())["asked"]
    kept, asked = run / KEPT, {"config": config.dump(), "measure": measure.dump(), "beside": beside}
    if kept.is_file():
        found = json.loads(kept.read_text())
        if found["asked"] != asked:
            raise ConfigError(f"{kept}: was measured with other options; remove the folder, or choose another runs=")
        return found["measured"]
    log.info("%s", config.run.name)
    start, before = time.monotonic(), _seconds(config)
    summary = train(config)
    if "stopped_by" in summary:
        raise KeyboardInterrupt
    figures, details = measure.measure(run, other)
    found = {
        "folder": str(run),
        "steps": summary["step"],
        "seconds": round(before + time.monotonic() - start, 1),
        "parameters": summary["parameters"],
        "learning_rate": config.optimizer.learning_rate,
        "figures": figures,
        **details,
    }
    write_json_atomically(kept, {"asked": asked, "measured": found})
    # Each run has programs of its own: what the ones before it compiled is of no more use.
    jax.clear_caches()
    return found


def _seconds(config: RunConfig) -> float:
    """Wall time of the sessions before, if a run was stopped."""
    summary = Path(config.run.dir) / "summary.json"
    return json.loads(summary.read_text())["seconds"] if summary.is_file() else 0.0
