"""How large a batch a machine holds, and what would make a step fit that does not; every answer has been compiled."""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from efficient_lm.config import RunConfig
from efficient_lm.errors import ConfigError
from efficient_lm.training.accounting import device_bytes
from efficient_lm.training.compiling import compiled_step, defined_for
from efficient_lm.training.machines import Machine
from efficient_lm.training.parallelism import ParallelismSpec
from efficient_lm.training.portions import Portions
from efficient_lm.training.setup import Definition
from kernels_pallas.ahead import TooLarge

COMPILED = 6
"""Sizes that a search compiles at most, beside the one it is given."""

FSDP = ParallelismSpec(mesh={"fsdp": -1}, rules={"embed": "fsdp"})


class Fit(NamedTuple):
    """A batch that fits.

    Attributes:
        rows: that a device computes at a time.
        batch_size: all rows of a step.
        peak: bytes of one device.
    """

    rows: int
    batch_size: int
    peak: int


def peak_of(defined: Definition, machine: Machine, batch: tuple[int, int] | None = None) -> int:
    """Bytes of one device at the peak of a step, also of one that the compiler refuses."""
    try:
        return compiled_step(defined, machine, batch).peak_bytes
    except TooLarge as error:
        return error.needed


def largest(sizes: dict[int, int], limit: float, peak: Callable[[int], int], compiled: int = COMPILED) -> int:
    """The largest size whose peak is within a limit; 0 if none is.

    A line through the two sizes nearest to the limit says which size to try next, until the size above the best one
    was tried, or is by that line too large.

    Args:
        sizes: peaks that are known, at least one; those that are found are added.
        peak: of a size, at least 1.
        compiled: sizes to try at most.
    """
    for _ in range(compiled):
        fitting = max((size for size, found in sizes.items() if found <= limit), default=0)
        above = min((size for size, found in sizes.items() if found > limit), default=None)
        if above == fitting + 1:
            break
        guess = _guess(sizes, limit)
        if guess is None:
            guess = 2 * fitting if above is None else max(above // 2, fitting + 1)
        elif guess == fitting and len(sizes) > 2:
            break
        highest = 16 * fitting if above is None else above - 1
        guess = min(max(guess, fitting + 1), highest)
        sizes[guess] = peak(guess)
    return max((size for size, found in sizes.items() if found <= limit), default=0)


def _guess(sizes: Mapping[int, int], limit: float) -> int | None:
    """Where the line through the two sizes nearest to the limit meets it; None: there is no such line."""
    if len(sizes) < 2:
        return None
    one, two = sorted(sorted(sizes, key=lambda size: abs(sizes[size] - limit))[:2])
    slope = (sizes[two] - sizes[one]) / (two - one)
    return None if slope <= 0 else max(int(one + (limit - sizes[one]) / slope), 0)


def largest_batch(config: RunConfig, machine: Machine, peak: int) -> Fit | None:
    """The largest batch of rows as long as the longest whose step fits, with as many micro-batches as now.

    Args:
        peak: of the step as it is.

    Returns:
        None: not even one row on each device at a time.
    """
    defined = defined_for(config, machine)
    rows, length = defined.portions.largest.batch
    unit = defined.layout.batch_ways * config.train.accumulate
    sizes = {rows // unit: peak}
    found = largest(sizes, machine.memory, lambda size: peak_of(defined, machine, (size * unit, length)))
    return Fit(found, found * unit, sizes[found]) if found else None


def with_fitting_accumulate(config: RunConfig, machine: Machine) -> RunConfig:
    """The config; where its micro-batches do not divide over the devices, with the most that do, if any number does."""
    ways = config.parallelism.build(list(machine.devices)).batch_ways
    batches = [portion.rows for portion in Portions(config.train).portions]
    for count in range(config.train.accumulate, 0, -1):
        if not any(rows % (ways * count) for rows in batches):
            return config if count == config.train.accumulate else _changed(config, train={"accumulate": count})
    return config


class Remedy(NamedTuple):
    """Keys that make a step fit, and its peak with them in bytes of one device."""

    keys: tuple[str, ...]
    peak: int


Change = tuple[str, RunConfig]
"""The key that says it, and the config after it."""


def remedy(config: RunConfig, machine: Machine) -> Remedy | None:
    """The smallest change that makes a step fit which does not; None: none of those that are tried.

    These are more micro-batches, recomputing, dividing the parameters over the devices, and two or all of them.
    """
    kinds = [_one_row, _recomputed, *([_divided] if len(machine.devices) > 1 else [])]
    tried = [changes for count in range(1, len(kinds) + 1) for changes in combinations(kinds, count)]
    return next(filter(None, (_after(changes, config, machine) for changes in tried)), None)


def _after(changes: Sequence[Callable], config: RunConfig, machine: Machine) -> Remedy | None:
    """All of some changes, if the step then fits."""
    keys: list[str] = []
    for change in sorted(changes, key=[_divided, _recomputed, _one_row].index):
        before, found = config, change(config, machine)
        if found is None:
            return None
        key, config = found
        keys.append(key)
    peak = _peak(config, machine)
    if peak > machine.memory:
        return None
    return _fewest(before, machine, keys[:-1]) if _one_row in changes else Remedy(tuple(keys), peak)


def _fewest(config: RunConfig, machine: Machine, keys: Sequence[str]) -> Remedy:
    """As few micro-batches as fit, where one row at a time does."""
    counts, peaks = _counts(config, machine), {}

    def fits(count: int) -> bool:
        peaks[count] = _peak(_changed(config, train={"accumulate": count}), machine)
        return peaks[count] <= machine.memory

    count = counts[bisect_left(counts, True, hi=len(counts) - 1, key=fits)]
    if count not in peaks:
        fits(count)
    return Remedy((*keys, f"train.accumulate={count}"), peaks[count])


def _counts(config: RunConfig, machine: Machine) -> list[int]:
    """Numbers of micro-batches above that of the config which divide every batch over the devices."""
    ways = config.parallelism.build(list(machine.devices)).batch_ways
    rows = math.gcd(*(portion.rows for portion in Portions(config.train).portions))
    return [count for count in range(config.train.accumulate + 1, rows // ways + 1) if rows % (ways * count) == 0]


def _one_row(config: RunConfig, machine: Machine) -> Change | None:
    """On each device at a time."""
    counts = _counts(config, machine)
    return (f"train.accumulate={counts[-1]}", _changed(config, train={"accumulate": counts[-1]})) if counts else None


def _recomputed(config: RunConfig, machine: Machine) -> Change | None:
    return None if config.model.remat == "full" else ("model.remat=full", _changed(config, model={"remat": "full"}))


def _divided(config: RunConfig, machine: Machine) -> Change | None:
    if "fsdp" in config.parallelism.mesh:
        return None
    return "parallelism=fsdp", config.model_copy(update={"parallelism": FSDP})


def _changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


def _peak(config: RunConfig, machine: Machine) -> float:
    """Of a step; of one that cannot be, or whose state alone is too large, more than any machine has."""
    try:
        defined = defined_for(config, machine)
    except ConfigError:
        return math.inf
    state = device_bytes(defined.abstract_state())
    return math.inf if state > machine.memory else peak_of(defined, machine)
