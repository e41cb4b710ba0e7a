"""Proof for a config that resuming changes nothing: N steps and N more against 2 N in one go, bit by bit.

Each part is a call of `train` of its own, which has nothing but the run directory to go on from: compiled programs are
dropped in between, so that the second half is compiled anew as after a restart. The process stays the same, because
accelerators are held by one process at a time.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from efficient_lm.config import RunConfig
from efficient_lm.errors import ConfigError
from efficient_lm.training.checkpoints import AVERAGE
from efficient_lm.training.loop import train
from efficient_lm.training.reporting import read_metrics
from efficient_lm.training.trackers import NoTrackerSpec
from efficient_lm.verification.findings import Finding, State

COMPARED = ("loss", "grad_norm", "tokens", "learning_rate")
"""What rows of the same step have in common, whatever the time they took."""


def prove(config: RunConfig, steps: int, folder: Path) -> list[Finding]:
    """Train twice in `folder`, and compare losses, parameters and optimizer state.

    Args:
        config: of any run; its directory, tracker and limits of time are not used.
        steps: N; the schedule stays that of the whole run.
        folder: an empty one with room for four checkpoints.

    Raises:
        ConfigError: the run has fewer than 2 N steps.
        KeyboardInterrupt: a signal came.
    """
    total = config.train.steps
    if 2 * steps > total:
        raise ConfigError(f"steps: {steps} and as many again are more than train.steps={total}; at most {total // 2}")
    whole, halves = folder / "whole", folder / "halves"
    _train(config, whole, steps, 2 * steps)
    for stop in (steps, 2 * steps):
        _train(config, halves, steps, stop)
    found = [_compare_losses(whole, halves)]
    for step in (steps, 2 * steps):
        places = [path / "checkpoints" / str(step) for path in (whole, halves)]
        for item in ("parameters", "optimizer", *([AVERAGE] if config.train.average else [])):
            found.append(_compare_arrays(f"{item}, step {step}", *(_read(place, item) for place in places)))
    return found


def _train(config: RunConfig, folder: Path, every: int, stop: int) -> None:
    limits = {"stop_at": stop, "minutes": None, "log_every": 1, "checkpoint_every": every, "keep_checkpoints": 2}
    changed = {
        "train": config.train.model_copy(update=limits),
        "run": config.run.model_copy(update={"dir": str(folder)}),
        "tracker": NoTrackerSpec(),
    }
    print(f"{folder.name}: to step {stop}", flush=True)
    summary = train(config.model_copy(update=changed))
    jax.clear_caches()
    if summary["step"] != stop:
        raise KeyboardInterrupt


def _compare_losses(whole: Path, halves: Path) -> Finding:
    rows = [{row["step"]: row for row in read_metrics(path) if "loss" in row} for path in (whole, halves)]
    for step, row in rows[0].items():
        other = rows[1].get(step, {})
        for name in COMPARED:
            if row.get(name) != other.get(name):
                said = f"{name} is {row.get(name)} in one go and {other.get(name)} resumed"
                return Finding("losses", State.FAULT, f"step {step}: {said}")
    return Finding("losses", State.OK, f"{len(rows[0])} steps are equal to the bit")


def _read(place: Path, item: str) -> dict[str, np.ndarray]:
    """Name → array of an item of a checkpoint, on the host."""
    abstract = ocp.checkpointables_metadata(place).metadata[item]
    empty = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract)
    tree = ocp.load_checkpointables(place, {item: empty})[item]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _compare_arrays(what: str, whole: dict[str, Any], halves: dict[str, Any]) -> Finding:
    differing = list(_differences(whole, halves))
    if not differing:
        return Finding(what, State.OK, f"{len(whole)} arrays are equal to the bit")
    rest = f"; so do {len(differing) - 1} more of {len(whole)} arrays" if len(differing) > 1 else ""
    return Finding(what, State.FAULT, f"{differing[0]}{rest}")


def _differences(whole: dict[str, Any], halves: dict[str, Any]) -> Iterator[str]:
    """A line per array that is not the same, in the order of the tree."""
    for name in sorted(set(whole) ^ set(halves)):
        yield f"'{name}' is in one of them alone"
    for name in whole.keys() & halves.keys() if set(whole) != set(halves) else whole:
        one, other = (np.atleast_1d(np.asarray(tree[name])) for tree in (whole, halves))
        if one.shape != other.shape or one.dtype != other.dtype:
            yield f"'{name}' is {one.dtype}{list(one.shape)} in one go and {other.dtype}{list(other.shape)} resumed"
        elif not np.array_equal(one.view(np.uint8), other.view(np.uint8)):
            gaps = np.abs(one.astype(np.float64) - other.astype(np.float64))
            count = np.count_nonzero(np.not_equal(one, other))
            largest = np.abs(one.astype(np.float64)).max()
            yield (
                f"'{name}' differs in {count:,} of {one.size:,} values, by {np.nanmax(gaps):.3g} at most "
                f"(values are up to {largest:.3g})"
            )
