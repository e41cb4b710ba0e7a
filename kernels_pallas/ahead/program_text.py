"""A compiled program as text (``compiled.as_text()``): its operations, and how often each of them runs in one call."""

import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

_ITEM = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "bf16": 16}  # bits; others end in them, as f32 and s8 do
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_OPERATION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+)(?: \(.*)? \{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONSTANT = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")
_APPLIES = ("reduce-scatter", "reduce", "sort", "scatter", "select-and-scatter", "map")
"""Operations whose `to_apply` is one step of them; so are those that begin with all-reduce and reduce-window."""


class Operation(NamedTuple):
    """A line of a program.

    Attributes:
        name: by which others of its computation read it.
        kind: such as ``dot``, ``fusion`` or ``all-gather-start``.
        shape: of its result, as text; of several in brackets.
        operands: names.
        called: names of the computations it runs.
        root: whether it is the result of its computation.
        line: all of it.
    """

    name: str
    kind: str
    shape: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    root: bool
    line: str


class Run(NamedTuple):
    """An operation in one of the places it runs from.

    Attributes:
        times: in one call of the program; None where a loop around it does not say.
        fused: whether it is part of another one, and so neither reads nor writes memory by itself.
        computation: name of the one it stands in.
    """

    operation: Operation
    times: int | None
    fused: bool
    computation: str


class ProgramText:
    """The computations of a program.

    Attributes:
        computations: operations by name, by name of the computation.
        entry: name of the computation that a call runs.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Operation]] = {}
        self.entry = name = ""
        for line in text.splitlines():
            head = None if line.startswith(" ") else _HEAD.match(line)
            if head:
                name = head[2]
                self.computations[name] = {}
                self.entry = name if head[1] else self.entry
            elif name and (found := _operation(line)):
                self.computations[name][found.name] = found

    @cached_property
    def runs(self) -> list[Run]:
        """Every operation, once for each place it is called from; of a conditional those of all branches."""
        found: list[Run] = []

        def visit(name: str, times: int | None, fused: bool) -> None:
            for operation in self.computations.get(name, {}).values():
                found.append(Run(operation, times, fused, name))
                inner = times
                if operation.kind == "while":
                    count = self._trips(operation.line)
                    inner = None if times is None or count is None else times * count
                for called in operation.called:
                    visit(called, inner, fused or operation.kind in ("fusion", "fusion-start"))

        visit(self.entry, 1, False)
        return found

    def size(self, computation: str, name: str) -> int:
        """Bytes of the result of an operation; 0 where there is none of that name."""
        found = self.computations.get(computation, {}).get(name)
        return 0 if found is None else size(found.shape)

    def _trips(self, line: str) -> int | None:
        """How often a loop runs: as the compiler says, or else until it has counted to the number it compares with."""
        if said := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
            return int(said[1])
        named = {part: name for part, name in re.findall(r"(condition|body)=%?([\w.-]+)", line)}
        lines = self._lines(named.get("condition", ""))
        numbers = {int(number) for each in lines for number in _CONSTANT.findall(each)}
        return -(-numbers.pop() // self._increment(**named)) if len(numbers) == 1 else None

    def _increment(self, condition: str, body: str) -> int:
        """By how much a loop's counter grows in a turn: two, say, where the compiler made one turn of two."""
        compared, turn = self._root(condition), self.computations.get(body, {})
        counters = [self.computations[condition].get(name) for name in compared.operands] if compared else []
        places = [
            re.search(r"index=(\d+)", each.line) for each in counters if each and each.kind == "get-tuple-element"
        ]
        result = self._root(body)
        if len(places) != 1 or result is None or result.kind != "tuple":
            return 1
        grown = turn.get(result.operands[int(places[0][1])])
        added = [_CONSTANT.search(turn[name].line) for name in grown.operands if name in turn] if grown else []
        return next((int(number[1]) for number in added if number), 1)

    def _root(self, computation: str) -> Operation | None:
        return next((each for each in self.computations.get(computation, {}).values() if each.root), None)

    def _lines(self, computation: str) -> Iterator[str]:
        for operation in self.computations.get(computation, {}).values():
            yield operation.line
            for called in operation.called:
                yield from self._lines(called)


def _operation(line: str) -> Operation | None:
    match = _OPERATION.match(line)
    if match is None:
        return None
    root, name, shape, kind, rest = match.groups()
    return Operation(name, kind, shape, tuple(_operands(rest)), tuple(_called(line, kind)), root is not None, line)


def _operands(rest: str) -> list[str]:
    """Names between the opening bracket and the one that closes it."""
    depth = 1
    for place, mark in enumerate(rest):
        depth += (mark == "(") - (mark == ")")
        if depth == 0:
            return re.findall(r"%([\w.-]+)", rest[:place])
    return re.findall(r"%([\w.-]+)", rest)


def _called(line: str, kind: str) -> list[str]:
    if kind in _APPLIES or kind.startswith(("all-reduce", "reduce-window")):
        return []
    branches = _BRANCHES.search(line)
    named = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
    return named + _CALLED.findall(line)


def parts(shape: str) -> list[str]:
    """The shapes of a tuple, one level of brackets down; of another shape that one alone."""
    if not shape.startswith("("):
        return [shape]
    found, depth = [""], 0
    for mark in shape[1:-1]:
        depth += (mark in "([{") - (mark in ")]}")
        if mark == "," and depth == 0:
            found.append("")
        else:
            found[-1] += mark
    return [each.strip() for each in found]


def size(shape: str, main_memory: bool = False) -> int:
    """Bytes of a shape as programs write it, or of all shapes in it.

    Args:
        main_memory: leave out what its layout puts elsewhere, as into a TPU's vector memory: ``{1,0:T(8,128)S(1)}``.
    """
    total = 0
    for kind, sizes, layout in _SHAPE.findall(shape):
        if main_memory and re.search(r"S\([1-9]", layout):
            continue
        bits = _ITEM.get(kind) or int(re.search(r"\d+", kind)[0] if re.search(r"\d+", kind) else 0)
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total
