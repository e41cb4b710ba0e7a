"""An audit of a run directory: is everything there, whole, and in agreement with the rest? Nothing is written.

Items in order: `config.yaml`, the tokenizer, each checkpoint, `metrics.jsonl`, `summary.json`, the data, secrets.
"""

import fcntl
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efficient_lm.config import RunConfig, read_config
from efficient_lm.data.fingerprint import fingerprint
from efficient_lm.data.tokenizers import load_tokenizer
from efficient_lm.errors import CheckpointError, DataError, UserError
from efficient_lm.models.parameters import count_parameters
from efficient_lm.training.checkpoints import UNFINISHED, Checkpoints, load_parameters, read_record
from efficient_lm.training.run_directory import RunDirectory, locate
from efficient_lm.verification.findings import Finding, State, guarded
from efficient_lm.verification.rows import check_rows, training_rows
from efficient_lm.verification.secrets import secrets_in

SHOWN = 5
"""Names in a line before the rest is counted."""


def audit(path: str | Path) -> list[Finding]:
    """What is found in the run directory at `path`. Raises `CheckpointError` if it is none."""
    run, _ = locate(Path(path))
    found = list(_lock(run))
    try:
        config = read_config(run.config)
        model = config.model.build()
    except UserError as error:
        return [*found, Finding("config", State.FAULT, str(error)), *secrets_in(run.path)]
    parameters = count_parameters(model.declarations)
    found.append(Finding("config", State.OK, f"valid: {parameters:,} parameters, {config.train.steps:,} steps"))
    records: dict[int, dict[str, Any]] = {}
    checks = {
        "checkpoints": partial(_checkpoints, run, model, records),
        "tokenizer": partial(_tokenizer, run, config, records),
        "metrics": partial(check_rows, run.path, config, records),
        "summary": partial(_summary, run, config, parameters),
        "data": partial(_data, config, records),
    }
    for what, check in checks.items():
        found += guarded(what, check)
    return [*found, *secrets_in(run.path)]


def _lock(run: RunDirectory) -> Iterator[Finding]:
    try:
        with open(run.path / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield Finding("lock", State.WARNING, "a process is training here: what is found may change meanwhile")
    except OSError:
        return


def _checkpoints(run: RunDirectory, model: Any, records: dict[int, dict[str, Any]]) -> Iterator[Finding]:
    """Whether each checkpoint is whole, and the newest can be loaded; `records` is filled with what they say."""
    checkpoints = Checkpoints(run.checkpoints)
    steps = checkpoints.steps
    if not steps:
        yield Finding("checkpoints", State.WARNING, "there is none")
    for step in steps:
        what, wrong = f"checkpoint {step}", checkpoints.damage(step)
        if wrong is not None:
            yield Finding(what, State.FAULT, f"damaged: {wrong}")
            continue
        record = records[step] = read_record(run.checkpoints / str(step))
        if record.get("step") != step:
            yield Finding(what, State.FAULT, f"says that it is of step {record.get('step')}")
        elif "checksums" in record:
            yield Finding(what, State.OK, "whole: every file is as it was written")
        else:
            yield Finding(what, State.WARNING, "has no checksums (it was saved by an earlier version)")
    checkpoints.close()
    if records:
        yield _loaded(run, model, max(records))
    left = [*run.checkpoints.glob("*.orbax-checkpoint-tmp*"), *run.checkpoints.glob(f"{UNFINISHED}/*")]
    if left:
        yield Finding("left over", State.WARNING, f"of a save that did not end: {_some(left)}; the next one tidies up")
    aside = sorted(run.path.glob("*_checkpoint_*"))
    if aside:
        yield Finding("set aside", State.WARNING, f"{_some(aside)}: look at them, then delete them")


def _loaded(run: RunDirectory, model: Any, step: int) -> Finding:
    params, _ = load_parameters(run.checkpoints, model.declarations, step)
    bad = sum(int(leaf.size - np.isfinite(leaf).sum()) for leaf in map(np.asarray, jax.tree.leaves(params)))
    if bad:
        return Finding("parameters", State.FAULT, f"{bad:,} values of checkpoint {step} are no finite numbers")
    return Finding("parameters", State.OK, f"those of checkpoint {step} fit the config, and all are finite")


def _tokenizer(run: RunDirectory, config: RunConfig, records: dict[int, dict[str, Any]]) -> Iterator[Finding]:
    try:
        mark = load_tokenizer(run.tokenizer).fingerprint
    except DataError as error:
        yield Finding("tokenizer", State.FAULT, str(error))
        return
    others = [step for step, record in records.items() if record.get("tokenizer", mark) != mark]
    if others:
        yield Finding("tokenizer", State.FAULT, f"is not the one that checkpoint {others[0]} was trained with")
    else:
        yield Finding("tokenizer", State.OK, f"{config.tokenizer.kind}, that of every checkpoint")


def _summary(run: RunDirectory, config: RunConfig, parameters: int) -> Iterator[Finding]:
    """Whether `summary.json` says what the rows and the checkpoints do."""
    try:
        summary = json.loads(run.summary.read_text())
    except FileNotFoundError:
        yield Finding("summary", State.WARNING, "there is none: no process came to an end here")
        return
    except (OSError, ValueError) as error:
        yield Finding("summary", State.FAULT, f"cannot be read: {error}")
        return
    try:
        rows = training_rows(run.path)
    except CheckpointError:
        rows = []  # A fault of its own.
    held_out = [row for row in rows if "val_loss" in row]
    claims = {"step": max(Checkpoints(run.checkpoints).steps, default=None), "parameters": parameters}
    if rows:
        claims["tokens"] = rows[-1].get("tokens")
    if held_out and held_out[-1]["step"] == summary.get("step"):
        claims |= {name: value for name, value in held_out[-1].items() if name in summary and name != "step"}
    wrong = [
        f"{name} is {summary.get(name)} and should be {value}"
        for name, value in claims.items()
        if value is not None and not _same(summary.get(name), value)
    ]
    going_on = claims["step"] is not None and summary.get("step", math.inf) < claims["step"]
    if wrong and going_on:
        yield Finding(
            "summary", State.WARNING, f"is of step {summary['step']}, and the run went on to {claims['step']}"
        )
    elif wrong:
        yield Finding("summary", State.FAULT, "; ".join(wrong))
    else:
        stopped = summary.get("stopped_by")
        how = f"stopped by {stopped}" if stopped else "complete"
        yield Finding("summary", State.OK, f"{how} at step {summary['step']:,} of {config.train.steps:,}; agrees")


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(found, float) or isinstance(wanted, float):
        return found is not None and math.isclose(found, wanted, rel_tol=1e-9)
    return found == wanted


def _data(config: RunConfig, records: dict[int, dict[str, Any]]) -> Iterator[Finding]:
    """Whether the rows that the newest checkpoint was trained on can be made again."""
    recorded = records[max(records)].get("data") if records else None
    try:
        tokenizer = config.tokenizer.build()
        now = fingerprint(config.data.open(tokenizer, config.train.sequence_length, config.run.seed))
    except DataError as error:
        yield Finding("data", State.WARNING, f"cannot be opened here, so its order was not looked at: {error}")
        return
    if recorded is None:
        yield Finding("data", State.WARNING, "its fingerprint was not recorded (an earlier version, or no checkpoint)")
    elif recorded != now:
        yield Finding("data", State.FAULT, "is not what was trained on, or in another order: resuming would go astray")
    else:
        yield Finding("data", State.OK, "the same rows in the same order, by their fingerprint")


def _some(paths: list[Path]) -> str:
    names = ", ".join(path.name for path in paths[:SHOWN])
    return names + (f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else "")
