"""Evidence: one question put to several arms, each a few runs of `train`, and a page with what was measured.

Every run has a folder of its own and is finished once; the same command goes on where it was stopped.
"""

import itertools
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from efficient_lm.composition import builtin_configs, read_yaml
from efficient_lm.config import RunConfig, load_run_config
from efficient_lm.errors import ConfigError, UserError, nearest
from efficient_lm.evidence_page import page
from efficient_lm.overrides import parse
from efficient_lm.runtime import surroundings
from efficient_lm.spec import Count, Fraction, Listing, Natural, Positive, Spec
from efficient_lm.training.reporting import write_atomically, write_json_atomically
from efficient_lm.validation import validate

log = logging.getLogger(__name__)

KEPT = "evidence.json"
"""In each run's folder: what was measured, once it is finished."""
RESULTS = Path("docs/results")

Arms = Annotated[dict[str, Listing[str]], Field(min_length=1)]


class Expectation(Spec):
    """What the mean accuracy of an arm should be, over seeds, at one length; null is the length of training."""

    arm: str
    length: Count | None = None
    at_least: Fraction | None = None
    at_most: Fraction | None = None


class EvidenceSpec(Spec):
    """A question and how it is put.

    Attributes:
        question: in a sentence or two, for the page.
        overrides: of the command line, for every run.
        arms: name → what makes it different.
        grid: key → values; every arm is measured at every point.
        learning_rates: tried with the first seed; the one with the best accuracy is kept for the others. Empty leaves
            what the overrides say.
        seeds: of parameters and rows.
        lengths: of rows that accuracy is measured at after training; empty takes the one of training.
        limit: rows measured at each length; None takes all.
        expect: what the page says has come true or not.
        only: arms to measure; empty takes all.
        runs: folder of the runs.
        output: folder of the page; None takes `docs/results`, or the runs' folder when the command line changed
            anything.
    """

    question: str
    overrides: Listing[str] = ()
    arms: Arms
    grid: dict[str, Listing[Any]] = {}
    learning_rates: Listing[Positive] = ()
    seeds: Annotated[Listing[Natural], Field(min_length=1)] = (0,)
    lengths: Listing[Count] = ()
    limit: Count | None = None
    expect: Listing[Expectation] = ()
    only: Listing[str] = ()
    runs: str = "runs/evidence"
    output: str | None = None

    @model_validator(mode="after")
    def _names(self) -> "EvidenceSpec":
        for name in (*self.only, *(expected.arm for expected in self.expect)):
            if name not in self.arms:
                raise ConfigError(f"only, expect: no arm is named '{name}'; {nearest(name, self.arms)}")
        return self

    def points(self) -> Iterator[dict[str, Any]]:
        """Every point of the grid: key → value."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


def read_evidence(name: str, arguments: Sequence[str] = ()) -> EvidenceSpec:
    """`configs/evidence/NAME.yaml`, with values of its own set by ``key=value``; other keys go to every run."""
    folder = builtin_configs() / "evidence"
    names = [file.stem for file in folder.glob("*.yaml")]
    if name not in names:
        raise ConfigError(f"{name}: no such evidence; {nearest(name, names)}")
    values = read_yaml(folder / f"{name}.yaml")
    for text in arguments:
        override = parse(text)
        if override.key_or_group in EvidenceSpec.keys():
            values[override.key_or_group] = override.value()
        else:
            values["overrides"] = [*values.get("overrides", ()), text]
    if arguments and values.get("output") is None:
        values["output"] = values.get("runs", EvidenceSpec.model_fields["runs"].default)
    return validate(EvidenceSpec, values, name)


def gather(name: str, arguments: Sequence[str] = ()) -> bool:
    """Do what is left of an evidence's runs and write its page; False if any of them failed.

    Raises:
        ConfigError: no such evidence, or a run that cannot be composed; nothing was run then.
    """
    spec = read_evidence(name, arguments)
    folder = Path(spec.runs) / name
    arms = [arm for arm in spec.arms if not spec.only or arm in spec.only]
    cells = [(point, arm) for point in spec.points() for arm in arms]
    for point, arm in cells:
        _config(spec, folder, point, arm, None, spec.seeds[0])
    rows = [_cell(spec, folder, point, arm) for point, arm in cells]
    facts = surroundings("efficient-lm", "jax", "jaxlib", "flax", "numpy")
    output = Path(spec.output) if spec.output else RESULTS
    output.mkdir(parents=True, exist_ok=True)
    write_json_atomically(output / f"{name}.json", {**facts, "evidence": spec.dump(), "rows": rows})
    write_atomically(output / f"{name}.md", page(name, spec.dump(), rows, facts))
    log.info("written: %s", output / f"{name}.md")
    return all("error" not in run for row in rows for run in row["runs"])


def _cell(spec: EvidenceSpec, folder: Path, point: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """An arm at a point: the learning rates with the first seed, then the best one with the others."""
    first, *others = spec.seeds
    tried = [_run(spec, folder, point, arm, rate, first) for rate in spec.learning_rates or (None,)]
    good = [run for run in tried if "error" not in run]
    if not good:
        return {"arm": arm, **point, "learning_rate": None, "tried": tried, "runs": tried[:1]}
    best = max(good, key=lambda run: run["accuracy"])
    runs = [best, *(_run(spec, folder, point, arm, best["rate"], seed) for seed in others)]
    return {"arm": arm, **point, "learning_rate": best["learning_rate"], "tried": tried, "runs": runs}


def _config(
    spec: EvidenceSpec, folder: Path, point: Mapping[str, Any], arm: str, rate: float | None, seed: int
) -> RunConfig:
    parts = {"arm": arm, **point, **({"rate": rate} if rate is not None else {}), "seed": seed}
    name = "-".join(f"{value}" if key == "arm" else f"{key.split('.')[-1]}{value}" for key, value in parts.items())
    given = [*spec.overrides, *spec.arms[arm], *(f"{key}={value}" for key, value in point.items())]
    given += [f"run.seed={seed}", f"run.name='{name}'", f"run.dir='{folder / name}'"]
    return load_run_config([*given, *([] if rate is None else [f"optimizer.learning_rate={rate}"])])


def _run(
    spec: EvidenceSpec, folder: Path, point: Mapping[str, Any], arm: str, rate: float | None, seed: int
) -> dict[str, Any]:
    """What one run measured; a fault is part of the answer, and the other runs go on."""
    config = _config(spec, folder, point, arm, rate, seed)
    try:
        return {"seed": seed, "rate": rate} | measured(config, spec.lengths, spec.limit)
    except Exception as error:
        log.error("%s: %s", config.run.name, error, exc_info=None if isinstance(error, UserError) else error)
        return {"seed": seed, "rate": rate, "error": (str(error).splitlines() or [type(error).__name__])[0]}


def measured(config: RunConfig, lengths: Sequence[int], limit: int | None) -> dict[str, Any]:
    """Train, or go on, and measure the answers at some lengths; what is kept in the run's folder is taken from there.

    Returns:
        `steps`, `seconds` (wall time, compiling and evaluation included), `parameters`, `learning_rate`, `accuracy` (on
        validation rows as in training) and `lengths` (see `efficient_lm.evaluation.answers.evaluate_answers`).

    Raises:
        ConfigError: the folder holds a finished run of another config.
        KeyboardInterrupt: a signal stopped the run; it can go on.
    """
    import jax

    from efficient_lm.api import load
    from efficient_lm.training.loop import train

    kept, asked = Path(config.run.dir) / KEPT, {"config": config.dump(), "lengths": [*lengths], "limit": limit}
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
    answers = load(config.run.dir).evaluate(sequence_length=[*lengths] or None, limit=limit)["lengths"]
    figures = {
        "steps": summary["step"],
        "seconds": round(before + time.monotonic() - start, 1),
        "parameters": summary["parameters"],
        "learning_rate": config.optimizer.learning_rate,
        "accuracy": summary["val_accuracy"],
        "lengths": answers,
    }
    write_json_atomically(kept, {"asked": asked, "measured": figures})
    # Each run has programs of its own: what the ones before it compiled is of no more use.
    jax.clear_caches()
    return figures


def _seconds(config: RunConfig) -> float:
    """Wall time of the sessions before, if a run was stopped."""
    summary = Path(config.run.dir) / "summary.json"
    return json.loads(summary.read_text())["seconds"] if summary.is_file() else 0.0
