"""Where a run begins: at its newest good checkpoint, at the state or the parameters of another, or at its seed.

A checkpoint is of no number of devices or processes: arrays are read straight into the places that the run now has.
"""

import logging
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from efficient_lm.composition import differences
from efficient_lm.config import RunConfig, read_config, save_config
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.training.changes import changes
from efficient_lm.training.checkpoints import Checkpoints, as_items, as_state, restore_from
from efficient_lm.training.initialization import read_source
from efficient_lm.training.processes import is_main
from efficient_lm.training.run_directory import RunDirectory, locate
from efficient_lm.training.session import Progress
from efficient_lm.training.setup import Setup

log = logging.getLogger(__name__)

_OF_ANOTHER = re.compile(r"(model|tokenizer)\.(?!remat|.*\.(implementation|chunk_size): )")
"""Changed keys that make another model; the rest of a model says how it is computed, and not what."""

State = dict[str, Any]
Found = tuple[dict[str, Any], dict[str, Any]]
"""Items and record of a checkpoint."""


def resume_or_start(setup: Setup, run: RunDirectory, checkpoints: Checkpoints) -> tuple[State, Progress]:
    """The newest good checkpoint's state, or a first one; `config.yaml` and the tokenizer are written.

    Raises:
        CheckpointError: what is there is of another architecture, tokenizer or optimizer, or cannot be read.
        ConfigError: a run that branches off has fewer steps than were done.
    """
    before = read_config(run.config) if checkpoints.steps and run.config.is_file() else None
    if before is not None:
        _check_architecture(before, setup.config, f"{run.path}: holds a run", "choose another run.name")
    found = checkpoints.restore(_expected(setup))
    if found is not None:
        checkpoints.set_aside_after(found[1]["step"])
        begun = _gone_on(setup, before, found, f"resuming {run.path}")
    elif setup.config.init_from is not None and setup.config.init_state == "all":
        begun = _branched(setup, checkpoints)
    else:
        begun = _begun(setup, run)
    if is_main():
        save_config(run.config, setup.config)
        setup.tokenizer.save(run.tokenizer)
    return begun


def _expected(setup: Setup) -> dict[str, Any]:
    """Per item of a checkpoint: shapes, dtypes, and where this run wants them."""
    return as_items(setup.abstract_state())


def _check_architecture(before: RunConfig, wanted: RunConfig, what: str, instead: str) -> None:
    breaking = [line for line in differences(before.dump(), wanted.dump()) if _OF_ANOTHER.match(line)]
    if breaking:
        raise CheckpointError(f"{what} of another architecture ({'; '.join(breaking[:3])}); {instead}")


def _gone_on(setup: Setup, before: RunConfig | None, found: Found, what: str) -> tuple[State, Progress]:
    items, record = found
    if record["tokenizer"] != setup.tokenizer.fingerprint:
        raise CheckpointError(f"{what}: it was trained with another tokenizer; choose another run.name")
    log.warning("%s from step %d", what, record["step"])
    for line in changes(before, setup, record):
        log.warning("%s", line)
    return _restored(setup, items, record)


def return_to(setup: Setup, run: RunDirectory, checkpoints: Checkpoints, steps: list[int]) -> tuple[State, Progress]:
    """The state of the newest good one of this run's checkpoints at `steps`, or without any the first one."""
    found = checkpoints.restore(_expected(setup), steps)
    return _begun(setup, run) if found is None else _restored(setup, *found)


def _restored(setup: Setup, items: dict[str, Any], record: dict[str, Any]) -> tuple[State, Progress]:
    state = _with_average(as_state(items), setup) | setup.kept_in_record(record)
    return state, Progress.of_record(record, _still_solved(setup.config, record))


def _begun(setup: Setup, run: RunDirectory) -> tuple[State, Progress]:
    return _first_state(setup, run) | setup.kept_in_record({}), Progress()


def _with_average(state: State, setup: Setup) -> State:
    """With an average that begins here, where one is asked for and the checkpoint has none."""
    if not setup.averaged or "average" in state:
        return state
    log.warning("train.average: the checkpoint has none; it begins with the parameters of step %d", state["step"])
    return state | {"average": jax.tree.map(jnp.copy, state["parameters"])}


def _still_solved(config: RunConfig, record: dict[str, Any]) -> bool:
    """Whether the accuracy that ended a run is still enough."""
    wanted = config.train.stop_at_accuracy
    return wanted is not None and record.get("solved_at_accuracy", 0.0) >= wanted


def _branched(setup: Setup, checkpoints: Checkpoints) -> tuple[State, Progress]:
    """Where another run stands, optimizer, step and place in the data included; it is this run's first checkpoint."""
    config = setup.config
    source, step = locate(Path(config.init_from))
    before = read_config(source.config)
    _check_architecture(before, config, f"init_from: {source.path} is", "init_state=parameters takes what both have")
    items, record = restore_from(source.checkpoints, _expected(setup), step)
    if record["step"] >= config.train.steps:
        raise ConfigError(
            f"train.steps: {config.train.steps}, but {source.path} has done {record['step']}, and with init_state=all "
            "the run goes on from there; set more steps, or init_state=parameters"
        )
    begun = _gone_on(setup, before, (items, record), f"branching off {source.path}")
    # Whatever becomes of the other run: started again, this one begins where it began.
    checkpoints.save(record["step"], items, record)
    return begun


def _first_state(setup: Setup, run: RunDirectory) -> State:
    """The state before the first step: with parameters from `init_from`, or from the seed."""
    if setup.config.init_from is None:
        return setup.fresh_state()
    source = read_source(Path(setup.config.init_from))
    if source.origin is not None and is_main():
        source.origin.save(run.origin)
    length = setup.config.train.sequence_length
    if source.context is not None and length > source.context:
        log.warning(
            "init_from: train.sequence_length %d is beyond the %d tokens that %s was made for; positions there are new "
            "to it (a rotary position's theta and scaling can be set: model.blocks.NAME.mixer.position)",
            length, source.context, source.where,
        )  # fmt: skip
    return setup.fresh_state(source)
