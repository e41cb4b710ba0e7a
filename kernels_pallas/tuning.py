"""Block sizes that ran fastest, per operator, kind of device and bucket of shapes: `tuning.json` beside the kernels.

`efficient-lm benchmark tune=OP` writes the tables; nothing is tuned while a model runs. Where there is no entry a
kernel takes the block sizes that its own heuristic states, and "auto" the plain JAX form: a kernel is the choice where
it was measured to be faster.
"""

import contextlib
import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from kernels_pallas.target import Target

HERE = Path(__file__).parent
_tried = jax.make_user_context(default_value=None)
_asked: list[str] | None = None


def bucket(**sizes: int) -> str:
    """The entry that shapes fall under: every size rounded up to a power of two, in the order given."""
    return " ".join(f"{name}={1 << math.ceil(math.log2(max(1, size)))}" for name, size in sizes.items())


def blocks(op: str, target: Target, shapes: str, heuristic: Mapping[str, int]) -> dict[str, int]:
    """Block sizes of an operator: those of its table, and those of the heuristic where the table has none."""
    if _asked is not None:
        _asked.append(shapes)
    if _tried.value is not None and _tried.value[0] == op:
        return {**heuristic, **dict(_tried.value[1])}
    return {**heuristic, **_entry(op, target, shapes).get("blocks", {})}


@contextlib.contextmanager
def trying(op: str, blocks: Mapping[str, int]) -> Iterator[None]:
    """Kernels of an operator take these block sizes inside, in the place of a table."""
    with _tried((op, tuple(blocks.items()))):
        yield


@contextlib.contextmanager
def asked() -> Iterator[list[str]]:
    """The buckets that kernels ask their tables for inside."""
    global _asked
    _asked = []
    try:
        yield _asked
    finally:
        _asked = None


def milliseconds(op: str, target: Target, shapes: str) -> Mapping[str, float]:
    """What each implementation was measured to take on this kind of device; empty where nothing was measured."""
    return _entry(op, target, shapes).get("milliseconds", {})


def write(op: str, kind: str, shapes: str, entry: Mapping[str, object]) -> Path:
    """Put an entry ``{"blocks": {...}, "milliseconds": {"pallas": ..., "xla": ...}}`` into an operator's table."""
    path = HERE / op / "tuning.json"
    table = {**_table(op)}
    table[kind] = dict(sorted({**table.get(kind, {}), shapes: dict(entry)}.items()))
    path.write_text(json.dumps(dict(sorted(table.items())), indent=2) + "\n")
    _table.cache_clear()
    return path


def _entry(op: str, target: Target, shapes: str) -> Mapping:
    return _table(op).get(target.kind, {}).get(shapes, {})


@functools.cache
def _table(op: str) -> Mapping:
    path = HERE / op / "tuning.json"
    return json.loads(path.read_text()) if path.exists() else {}
