"""Reading what devices exchange in a compiled program: how often each collective runs, and the bytes it moves."""

import math
import re
from collections import Counter, defaultdict
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_ITEM = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "bf16": 16}  # bits; others end in them, as f32 and s8 do
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
        kind: one of `KINDS`.
        operands: bytes that go in, on one device.
        devices: how many take part together.
        times: how often it runs in one call of the program.
        name: of what it was made for, as jax names operations.
    """

    kind: str
    operands: int
    devices: int
    times: int
    name: str

    @property
    def moved(self) -> float:
        """Bytes that a device sends in one call of the program, by algorithms that send as little as possible."""
        shares = {"all-gather": self.devices - 1, "collective-permute": 1, "all-reduce": 2 * self.sent}
        return self.operands * self.times * shares.get(self.kind, self.sent)

    @property
    def sent(self) -> float:
        """The share of an array that is not a device's own."""
        return (self.devices - 1) / self.devices


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program, of its text (``compiled.as_text()``).

    Raises:
        ValueError: a loop around a collective does not say how often it runs.
    """
    computations, entry = _computations(text)
    found: list[Collective] = []

    def visit(name: str, runs: int | None) -> None:
        shapes: dict[str, int] = {}
        for line in computations.get(name, ()):
            match = _OPERATION.match(line)
            if match is None:
                continue
            own, result, operation, rest = match.groups()
            shapes[own] = _bytes(result)
            kind = operation.removesuffix("-start")
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # TPUs have one as an all-reduce that keeps a part, fused
            if kind in KINDS:
                if runs is None:
                    raise ValueError(f"collectives: a loop around {own} does not say how often it runs")
                operands = sum(shapes.get(name, 0) for name in re.findall(r"%([\w.-]+)", rest.split(")")[0]))
                named = re.search(r'op_name="([^"]*)"', line)
                found.append(Collective(kind, operands, _devices(line), runs, named[1] if named else ""))
            inner = runs
            if operation == "while":
                count = _trips(line, computations)
                inner = None if runs is None or count is None else runs * count
            for called in _called(line, operation):
                visit(called, inner)

    visit(entry, 1)
    return found


def totals(found: list[Collective]) -> dict[str, dict[str, float]]:
    """By kind: how many there are in the program, how often they run, and bytes that a device sends."""
    table: dict[str, Counter] = defaultdict(Counter)
    for each in found:
        table[each.kind].update({"written": 1, "runs": each.times, "bytes": each.moved})
    return {kind: dict(row) for kind, row in sorted(table.items())}


def _trips(line: str, computations: dict[str, list[str]]) -> int | None:
    """How often a loop runs, as the compiler says, or else as the one number says that its condition compares with."""
    if said := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(said[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    lines = lines + [inner for name in _CALLED.findall("\n".join(lines)) for inner in computations.get(name, [])]
    numbers = {int(number) for each in lines for number in re.findall(r"s32\[\]\S* constant\((\d+)\)", each)}
    return numbers.pop() if len(numbers) == 1 else None


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation by name, and the name of the one that runs."""
    found: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.-]+)(?: \(.*)? \{\s*$|^(ENTRY )?%?([\w.-]+) \(.*\{\s*$", line)
        if head and not line.startswith(" "):
            name = head[2] or head[4]
            found[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            found[name].append(line)
    return found, entry


def _called(line: str, operation: str) -> list[str]:
    if operation in ("all-reduce", "reduce-scatter", "reduce", "sort", "scatter", "select-and-scatter", "map"):
        return []
    if operation.startswith(("all-reduce", "reduce-window")):
        return []
    branches = _BRANCHES.search(line)
    named = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
    return named + _CALLED.findall(line)


def _devices(line: str) -> int:
    """How many devices a collective joins."""
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return 2 if "source_target_pairs" in line else 1


def _bytes(shape: str) -> int:
    total = 0
    for kind, sizes in _SHAPE.findall(shape):
        bits = _ITEM.get(kind) or int(re.search(r"\d+", kind)[0] if re.search(r"\d+", kind) else 0)
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total
