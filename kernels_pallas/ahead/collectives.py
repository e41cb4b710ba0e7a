"""Reading what devices exchange in a compiled program: how often each collective runs, and the bytes it moves."""

import math
import re
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

from kernels_pallas.ahead.program_text import ProgramText

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
        kind: one of `KINDS`.
        operands: bytes that go in, on one device.
        devices: how many take part together.
        times: how often it runs in one call of the program.
        name: of what it was made for, as jax names operations.
        group: the devices of one exchange, by their places in the mesh; empty where the program names none.
    """

    kind: str
    operands: int
    devices: int
    times: int
    name: str
    group: tuple[int, ...] = ()

    @property
    def moved(self) -> float:
        """Bytes that a device sends in one call of the program, by algorithms that send as little as possible."""
        shares = {"all-gather": self.devices - 1, "collective-permute": 1, "all-reduce": 2 * self.sent}
        return self.operands * self.times * shares.get(self.kind, self.sent)

    @property
    def sent(self) -> float:
        """The share of an array that is not a device's own."""
        return (self.devices - 1) / self.devices


def collectives(text: str | ProgramText) -> list[Collective]:
    """Every collective of a compiled program, of its text (``compiled.as_text()``).

    Raises:
        ValueError: a loop around a collective does not say how often it runs.
    """
    program = ProgramText(text) if isinstance(text, str) else text
    found: list[Collective] = []
    for operation, times, _, computation in program.runs:
        kind = operation.kind.removesuffix("-start")
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # TPUs have one as an all-reduce that keeps a part, fused
        if kind not in KINDS:
            continue
        if times is None:
            raise ValueError(f"collectives: a loop around {operation.name} does not say how often it runs")
        operands = sum(program.size(computation, name) for name in operation.operands)
        named = re.search(r'op_name="([^"]*)"', operation.line)
        devices, group = _group(operation.line)
        found.append(Collective(kind, operands, devices, times, named[1] if named else "", group))
    return found


def totals(found: list[Collective]) -> dict[str, dict[str, float]]:
    """By kind: how many there are in the program, how often they run, and bytes that a device sends."""
    table: dict[str, Counter] = defaultdict(Counter)
    for each in found:
        table[each.kind].update({"written": 1, "runs": each.times, "bytes": each.moved})
    return {kind: dict(row) for kind, row in sorted(table.items())}


def _group(line: str) -> tuple[int, tuple[int, ...]]:
    """How many devices a collective joins, and those of the first group."""
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?", line):
        count, sizes, order = int(counted[1]), counted[2], counted[3]
        if sizes is None:
            return count, ()
        places = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
        places = places.transpose(_numbers(order)) if order else places
        return count, tuple(places.reshape(-1)[:count].tolist())
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(",")), tuple(_numbers(listed[1]))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? \{([^}]*)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[2])
        count = math.prod(int(part or sizes[axis]) for axis, _, part in parts)
        return count, _along(sizes, parts)
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line)
    if pairs:
        return 2, (int(pairs[1]), int(pairs[2]))
    return (2 if "source_target_pairs" in line else 1), ()


def _along(sizes: dict[str, int], parts: list[tuple[str, str, str]]) -> tuple[int, ...]:
    """The places of a mesh that differ from the first along some axes alone, or along a part of one."""
    places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    index: list[slice | int] = [0] * len(sizes)
    for axis, before, part in parts:
        size = sizes[axis]
        # 'fsdp':(2)4 is the middle of three axes that 'fsdp' is made of, the first of size 2, and this one of 4.
        step = size // (int(before) * int(part)) if part else 1
        index[list(sizes).index(axis)] = slice(0, step * int(part) if part else size, step)
    return tuple(np.asarray(places[tuple(index)]).reshape(-1).tolist())


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
