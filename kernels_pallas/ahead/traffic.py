"""Counting what a compiled program reads from and writes to main memory.

Every operation that is not part of another reads its operands and writes its result. A fusion that reads a few rows of
an operand reads these alone, and one that writes them into an array in place writes these alone: so a loop over layers
reads each layer once, though the arrays it is given hold all of them.
"""

import math
from collections.abc import Iterable

from kernels_pallas.ahead.program_text import Operation, ProgramText, Run, parts, size

_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call async-start async-update opt-barrier "
    "after-all partition-id replica-id domain".split()
)
_SLICES = ("dynamic-slice", "gather", "slice")
"""Operations that read as much as they write."""
_WRITES = "dynamic-update-slice"

Computation = dict[str, Operation]


def traffic(program: ProgramText) -> int:
    """Bytes that one device reads and writes in one call; a loop that does not say how often it runs counts once."""
    return sum(_bytes(program, run) * (1 if run.times is None else run.times) for run in program.runs if not run.fused)


def _bytes(program: ProgramText, run: Run) -> int:
    operation, own = run.operation, program.computations[run.computation]
    kind = operation.kind
    if kind in _FREE or kind.endswith("-done") or 'custom_call_target="AllocateBuffer"' in operation.line:
        return 0
    if kind in _SLICES:
        return 2 * _size(operation.shape)
    if kind == _WRITES:
        return 2 * _sizes(own, operation.operands[1:2])
    if kind == "scatter":
        return 2 * _sizes(own, operation.operands[-1:])
    if kind in ("fusion", "fusion-start") and operation.called:
        return _fusion(program, operation, own)
    if kind.endswith("-start") and operation.shape.startswith("("):
        return _size(operation.shape)  # what goes in stands beside what comes out
    return _sizes(own, operation.operands) + _size(operation.shape)


def _fusion(program: ProgramText, fusion: Operation, own: Computation) -> int:
    inside = program.computations[fusion.called[0]]
    read = 0
    for place, name in enumerate(fusion.operands):
        read += min(_sizes(own, [name]), _read(program, inside, _parameter(inside, place)))
    # Of one that is only started, the result stands between what goes in and what its end has to know.
    result = parts(fusion.shape)[1] if fusion.kind == "fusion-start" else fusion.shape
    return read + _written(inside, result)


def _parameter(inside: Computation, place: int) -> str:
    """The name of a fusion's operand inside of it."""
    mark = f" parameter({place})"
    return next((each.name for each in inside.values() if each.kind == "parameter" and mark in each.line), "")


def _read(program: ProgramText, inside: Computation, name: str) -> float:
    """Bytes that a fusion takes of one of its operands; infinite: all of it."""
    total = 0.0
    for user in inside.values():
        for place, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.kind in _SLICES and place == 0:
                total += _size(user.shape)
            elif user.kind == "bitcast":
                total += _read(program, inside, user.name)
            elif user.kind == "fusion" and user.called:
                within = program.computations[user.called[0]]
                total += _read(program, within, _parameter(within, place))
            elif user.kind != _WRITES and user.kind not in _SLICES or (user.kind == _WRITES and place == 1):
                return math.inf
    return total


def _written(inside: Computation, result: str) -> int:
    """Bytes that a fusion writes: of an array that it changes in place those that change."""
    root = next((each for each in inside.values() if each.root), None)
    if root is None:
        return _size(result)
    results = [inside[name] for name in root.operands if name in inside] if root.kind == "tuple" else [root]
    total = 0
    for each, shape in zip(results, parts(result), strict=False):
        source = _source(inside, each)
        total += _sizes(inside, source.operands[1:2]) if source.kind == _WRITES else _size(shape)
    return total


def _source(inside: Computation, operation: Operation) -> Operation:
    """What a bitcast shows."""
    while operation.kind == "bitcast" and operation.operands and operation.operands[0] in inside:
        operation = inside[operation.operands[0]]
    return operation


def _size(shape: str) -> int:
    return size(shape, main_memory=True)


def _sizes(operations: Computation, names: Iterable[str]) -> int:
    return sum(_size(operations[name].shape) for name in names if name in operations)
