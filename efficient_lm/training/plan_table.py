"""A plan as text."""

import os
from collections.abc import Iterator
from typing import Any

from efficient_lm.config import RunConfig
from efficient_lm.training.machines import PREALLOCATED, Machine

PARTS = {
    "parameters": "parameters, float32",
    "gradients": "gradients, float32",
    "optimizer": "optimizer state",
    "activations": "activations, logits, workspace",
    "peak": "peak",
}

WORK = {"compute": "FLOP", "memory": "B", "links": "B"}

Row = tuple[str, ...]
"""A name, its value and a note on it; of a heading the name alone."""


def lines(config: RunConfig, figures: dict[str, Any], machine: Machine, shardings: bool) -> Iterator[str]:
    """A plan (see `training.accounting.plan`), line by line; with where parameters live if `shardings`."""
    for key, (given, taken) in figures.get("changed", {}).items():
        yield f"{key}={given} does not divide the batch over the devices: planned with {key}={taken}; train so too"
    rows = [
        *_counts(figures),
        *_memory(config, figures, machine),
        *_largest(config, figures),
        *_collectives(figures),
        *_time(figures["time"], f"least time of a step on {machine}"),
        *_decode(config, figures, machine),
    ]
    width = max(len(row[0]) for row in rows if len(row) > 1)
    yield from (f"{row[0]:<{width}}  {row[1]:>18}  {''.join(row[2:])}".rstrip() if row[1:] else row[0] for row in rows)
    if shardings:
        yield from placements(figures)


def placements(figures: dict[str, Any]) -> Iterator[str]:
    """Where every parameter lives, and its optimizer state."""
    mesh = " × ".join(f"{axis}={count}" for axis, count in figures["mesh"].items())
    yield f"on each device of {mesh}: parameters, float32, and their optimizer state; axis/what divides it"
    rows = [
        (each.path, " ".join(f"{axis}={count}" for axis, count in zip(each.axes, each.shape, strict=True)), each)
        for each in figures["placements"]
    ]
    width, shape = (max(len(row[column]) for row in rows) for column in (0, 1))
    for path, axes, each in rows:
        yield f"  {path:<{width}}  {axes:<{shape}}  {size(each.parameter):>10}  {size(each.optimizer):>10}"


def size(count: float) -> str:
    """Bytes, in units of powers of 1000."""
    return f"{_scaled(count)}B" if count >= 1e3 else f"{count:.0f} B"


def _counts(figures: dict[str, Any]) -> Iterator[Row]:
    yield ("parameters",)
    yield from ((f"  {part}", f"{count:,}") for part, count in figures["parameters"].items())
    yield ("FLOPs",)
    yield from ((f"  {name} per token", f"{value / 1e6:,.2f} M") for name, value in figures["flops_per_token"].items())
    yield "  a step, on each device", f"{figures['flops_per_step'] / figures['devices']:.3g}"
    yield "  whole run", f"{figures['training_flops']:.3g} for {figures['tokens']:,} tokens"
    if len(figures["programs"]) > 1:
        yield ("steps",)
        for step, count, length in figures["programs"]:
            yield f"  from {step:,} on", f"{count:,} × {length:,} tokens"


def _memory(config: RunConfig, figures: dict[str, Any], machine: Machine) -> Iterator[Row]:
    train, memory = config.train, figures["bytes"]
    micro = train.batch_size // train.accumulate
    where = f"each of {machine}" if len(machine.devices) > 1 else str(machine)
    yield (f"memory of a step, {micro} × {train.sequence_length} tokens at a time, on {where}",)
    yield from ((f"  {shown}", size(memory[name])) for name, shown in PARTS.items())
    if machine.memory is not None:
        yield "  there is", f"{size(machine.memory)}, {memory['peak'] / machine.memory:.0%} used"
    fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", PREALLOCATED))
    if machine.target.platform == "gpu" and machine.topology and fraction < memory["peak"] / machine.memory <= 1:
        yield (f"  JAX takes {fraction:.0%} of a GPU unless told: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95",)
    yield f"cache of one sequence of {train.sequence_length} tokens", size(memory["cache_per_sequence"])


def _largest(config: RunConfig, figures: dict[str, Any]) -> Iterator[Row]:
    if "largest_batch" not in figures:
        return
    found = figures["largest_batch"]
    if found is None:
        yield "largest batch that fits", "none"
        return
    yield (f"largest batch that fits, {found['rows']} rows on a device at a time ({size(found['peak'])})",)
    yield f"  train.batch_size, with train.accumulate={config.train.accumulate}", f"{found['batch_size']:,}"


def _collectives(figures: dict[str, Any]) -> Iterator[Row]:
    if figures["collectives"]:
        yield ("sent by each device in a step",)
    for kind, row in figures["collectives"].items():
        yield f"  {kind} × {row['runs']:,}", size(row["bytes"])


def _time(time: dict[str, Any] | None, title: str) -> Iterator[Row]:
    if time is None:
        return
    yield (title,)
    for term in time["terms"]:
        unit = WORK[term["name"]]
        work, rate = f"{_scaled(term['amount'])}{unit}", f"{_scaled(term['rate'])}{unit}/s"
        basis = f"{work} at {term['efficiency']:.0%} of {rate} ({term['basis']})"
        yield f"  {term['name']}", _seconds(term["seconds"]), basis
    yield "  the longest of these", _seconds(time["seconds"]), f"{time['bound_by']}; the others overlap with it"
    yield "  tokens per second", f"{time['tokens_per_second']:,.0f}"
    yield "  model FLOPs utilisation", f"{time['mfu']:.1%}"


def _decode(config: RunConfig, figures: dict[str, Any], machine: Machine) -> Iterator[Row]:
    if "decode" not in figures:
        return
    found = figures["decode"]
    yield (f"memory of decoding one sequence of {config.train.sequence_length} tokens, on {machine.alone()}",)
    for name, shown in (("parameters", "parameters, float32"), ("cache", "cache"), ("peak", "peak")):
        yield f"  {shown}", size(found["bytes"][name])
    yield from _time(found["time"], "least time of a token")


def _seconds(value: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if value >= factor:
            return f"{value / factor:,.3g} {unit}"
    return f"{value / 1e-6:,.3g} µs"


def _scaled(value: float) -> str:
    for unit, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:,.2f} {unit}"
    return f"{value:,.0f} "
