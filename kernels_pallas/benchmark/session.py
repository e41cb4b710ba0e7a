"""Races and tuning as a user sees them: printed as they come, and kept in a file."""

from collections.abc import Sequence
from pathlib import Path

from kernels_pallas import tuning
from kernels_pallas.benchmark import race
from kernels_pallas.benchmark.calls import CALLS
from kernels_pallas.benchmark.cases import SETS, Case, cases
from kernels_pallas.benchmark.tune import tune

OPERATORS = tuple(CALLS)
PASSES = ("forward", "training")


class Unfit(ValueError):
    """What was asked for cannot be measured: no such case, or no kernel on this machine."""


def run(
    op: str | None,
    tuned: str | None,
    *,
    shapes: str,
    only: str | None,
    dtype: str,
    peers: Sequence[str],
    passes: Sequence[str],
    rounds: int,
    output: str | None,
) -> None:
    """Race one operator, or all, or tune one; see `configs/benchmark.yaml` for the keys.

    Raises:
        Unfit: naming the key.
    """
    if tuned is not None:
        return find_blocks(tuned, chosen(tuned, shapes, only, dtype), rounds)
    for each in [op] if op else OPERATORS:
        # Of all operators, some may have no such case.
        found = chosen(each, shapes, only, dtype) if op else _named(cases(each, shapes, dtype), only)
        measure(each, found, peers, passes, rounds, None if output is None else Path(output))


def chosen(op: str, shapes: str, only: str | None, dtype: str) -> list[Case]:
    """The cases of an operator whose name has `only` in it. Raises `Unfit` where there is none."""
    found = cases(op, shapes, dtype)
    named = _named(found, only)
    if not named:
        if not found:
            raise Unfit(f"shapes: {op} has none called {shapes}; valid: {', '.join(s for s in SETS if cases(op, s))}")
        raise Unfit(f"only: no case of {op} has '{only}' in its name; valid: {', '.join(case.name for case in found)}")
    return named


def _named(found: Sequence[Case], only: str | None) -> list[Case]:
    return [case for case in found if only is None or only in case.name]


def measure(
    op: str, cases: Sequence[Case], peers: Sequence[str], passes: Sequence[str], rounds: int, output: Path | None
) -> None:
    """Print a table for every case and pass; write all rows to `output`, a folder."""
    rows = []
    for case in cases:
        for training in [name == "training" for name in passes if name == "forward" or case.call.training]:
            part = race.race(case, peers, training, rounds)
            kind = "forward and backward" if training else "forward"
            print(f"\n{op}, {case.name}, {case.dtype}, {kind}\n{race.table(part)}", flush=True)
            rows += part
            if output is not None:
                # Written after every table, so that a session that is cut short keeps what it has.
                path = output / f"{op}_{race.device_name()}_{case.dtype}.json"
                race.save(path, op, rows)
    if output is not None and rows:
        print(f"\n{path}")


def find_blocks(op: str, cases: Sequence[Case], rounds: int) -> None:
    """Print what every choice of block sizes takes; the best of each case goes into the operator's table."""
    for case in cases:
        print(f"\n{op}, {case.name}, {case.dtype}")
        try:
            for blocks, found in tune(case, rounds):
                shown = f"{found:.3f} ms" if isinstance(found, float) else found
                print(f"  {' '.join(f'{name}={size}' for name, size in blocks.items())}: {shown}", flush=True)
        except ValueError as error:
            raise Unfit(f"tune={error}") from error
    print(f"\n{tuning.HERE / op / 'tuning.json'}")
