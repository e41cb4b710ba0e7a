"""What the fused TPU kernels of attention share: a tile of logits, who sees what in it, and where blocks lie.

Logits are to base 2: a power of two is what the hardware computes. What goes with a query or a key (position, document,
logsumexp) lies along the last axis in memory, as a row; where a tile needs it as a column it is transposed once per
block, since an array of width one would be stored 128 times its size.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.reference import NOTHING
from kernels_pallas.attention.visibility import Visibility
from kernels_pallas.attention.visits import PARTLY, WHOLLY, Visits

LANES = 128
MASKED = -1e30  # finite: a difference of two infinities would be NaN
LOG2_E = math.log2(math.e)
FLOOR = NOTHING * LOG2_E  # of a row's maximum: exp2(MASKED - FLOOR) is 0, so a row that sees nothing sums to 0
VMEM_BYTES = 48 * 2**20  # of 64 MiB at least, on every kind from v5e on; the compiler takes 16 otherwise


@dataclasses.dataclass(frozen=True)
class Options:
    """Of a call: the masking rule (no arrays), queries and keys there are, their blocks, and how logits are made.

    `simulated` is what `pallas_call` takes as `interpret`.
    """

    rule: Visibility
    time: int
    keys: int
    blocks: tuple[int, int]
    scale: float
    softcap: float | None
    simulated: bool | pltpu.InterpretParams


def product(left: jax.Array, right: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The matmul of two tiles over one axis of each, float32; float32 tiles at full precision."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def logits(options: Options, left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scaled, capped logits to base 2 of the rows of two tiles, and the slope of the cap, None without one."""
    products = product(left, right, (1, 1))
    if options.softcap is None:
        return options.scale * LOG2_E * products, None
    cap = jnp.tanh(options.scale / options.softcap * products)
    return options.softcap * LOG2_E * cap, 1 - cap * cap


def spread(column: jax.Array, width: int) -> jax.Array:
    """[n, LANES] of equal columns as [n, width]."""
    return jnp.tile(column, (1, -(-width // LANES)))[:, :width]


class Marks(NamedTuple):
    """What of the queries or keys a mask asks for beyond their index: names, and int32 [1|B, names, time] or None."""

    names: tuple[str, ...]
    values: jax.Array | None


def query_marks(visibility: Visibility) -> Marks:
    """Positions unless they are indices, and documents if there are several."""
    return _marks(position=_unordered(visibility, visibility.query_positions), document=visibility.segment_ids)


def key_marks(visibility: Visibility) -> Marks:
    """Positions unless they are indices, documents if there are several, and ranks where they matter and differ."""
    ranked = visibility.window is not None and visibility.kept > 0
    plain = visibility.in_order and visibility.segment_ids is None
    return _marks(
        position=_unordered(visibility, visibility.key_positions),
        document=visibility.key_segment_ids,
        rank=visibility.key_ranks if ranked and not plain else None,
    )


def _unordered(visibility: Visibility, positions):
    return None if visibility.in_order else positions


def _marks(**values) -> Marks:
    given = {name: value.astype(jnp.int32) for name, value in values.items() if value is not None}
    if not given:
        return Marks((), None)
    rows = max(value.shape[0] for value in given.values())
    full = [jnp.broadcast_to(value, (rows, value.shape[1])) for value in given.values()]
    return Marks(tuple(given), jnp.stack(full, axis=1))


def masked(options: Options, values: jax.Array, tile: Sequence, prefix, queries: Callable, keys: Callable):
    """The logits of a tile, [queries, keys] or the other way round, those of unseen keys MASKED.

    Args:
        tile: indices of the block of queries and of keys. prefix: of the batch row, a scalar.
        queries, keys: functions from the name of a mark to its column or row; "index" counts the block.
    """
    rule, (query_block, key_block) = options.rule, options.blocks
    index = key_block * tile[1] + keys("index")
    position = options.keys - options.time + query_block * tile[0] + queries("index")
    position, key = (position, index) if rule.in_order else (queries("position"), keys("position"))
    ranked = rule.window is not None and rule.kept > 0
    packed = rule.segment_ids is not None
    rank = None if not ranked else key if rule.in_order and not packed else keys("rank")
    documents = (queries("document"), keys("document")) if packed else (None, None)
    seen = rule.sees(position, key, rank, None if rule.prefix_length is None else prefix, *documents)
    if options.keys % key_block:
        inside = index < options.keys
        seen = inside if seen is None else seen & inside
    return values if seen is None else jnp.where(seen, values, MASKED)


def in_rows(names: Sequence[str], marks_ref, block: int) -> Callable:
    """For `masked`: marks [1, names, block] as rows."""

    def read(name):
        if name == "index":
            return jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
        return marks_ref[0, pl.ds(names.index(name), 1), :]

    return read


def in_columns(names: Sequence[str], columns_ref, block: int) -> Callable:
    """For `masked`: transposed marks [block, names] as columns."""

    def read(name):
        if name == "index":
            return jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0)
        return columns_ref[:, pl.ds(names.index(name), 1)]

    return read


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Where the visits of a kernel are: grid (batch, head, visit), or (batch, group, visit, member) if listed by keys.

    The last arguments of index maps and the first of kernels are `tables`: the visits and the prefix of every row.
    """

    options: Options
    batch: int
    heads: int
    groups: int
    rows: int
    count: int
    by_key: bool

    @classmethod
    def of(cls, options: Options, q, k, listed: Visits, *, by_key: bool = False) -> "Tiles":
        rows, count = listed.query.shape
        return cls(options, q.shape[0], q.shape[1], k.shape[1], rows, count, by_key)

    @property
    def grid(self) -> tuple[int, ...]:
        members = self.heads // self.groups
        return (self.batch, *((self.groups, self.count, members) if self.by_key else (self.heads, self.count)))

    def tables(self, listed: Visits, prefix) -> tuple[jax.Array, ...]:
        prefix = jnp.zeros((self.batch,), jnp.int32) if prefix is None else prefix.astype(jnp.int32)
        return (*(table.reshape(-1) for table in listed), prefix)

    def _place(self, ids):
        return (ids[0] * self.count if self.rows > 1 else 0) + ids[2]

    def _head(self, side: str, ids):
        members = self.heads // self.groups
        if self.by_key:
            return ids[1] if side == "key" else ids[1] * members + ids[3]
        return ids[1] if side == "query" else ids[1] // members

    def _spec(self, side: str, shape: Sequence[int], axis: int, per_head: bool, rows: int) -> pl.BlockSpec:
        def index(*arguments):
            ids, (queries, keys, _, _) = arguments[:-4], arguments[-4:]
            at = [0] * len(shape)
            at[0] = ids[0] if rows > 1 else 0
            if per_head:
                at[1] = self._head(side, ids)
            at[axis] = (queries if side == "query" else keys)[self._place(ids)]
            return tuple(at)

        return pl.BlockSpec(tuple(shape), index)

    def block(self, side: str) -> int:
        return self.options.blocks[side == "key"]

    def tokens(self, side: str, width: int) -> pl.BlockSpec:
        """Of [B, heads, time, width]."""
        return self._spec(side, (1, 1, self.block(side), width), 2, True, self.batch)

    def statistics(self, count: int) -> pl.BlockSpec:
        """Of [B, H, count, time], of queries."""
        return self._spec("query", (1, 1, count, self.block("query")), 3, True, self.batch)

    def marks(self, side: str, marks: Marks) -> pl.BlockSpec:
        rows, count, _ = marks.values.shape
        return self._spec(side, (1, count, self.block(side)), 2, False, rows)

    def visit(self, queries, keys, kinds, prefix) -> "Visit":
        """In a kernel: the visit it is at."""
        ids = [pl.program_id(axis) for axis in range(len(self.grid))]
        place, own = self._place(ids), keys if self.by_key else queries
        first = (ids[2] == 0) | (own[jnp.maximum(place - 1, 0)] != own[place])
        last = (ids[2] == self.count - 1) | (own[jnp.minimum(place + 1, self.rows * self.count - 1)] != own[place])
        if self.by_key:
            members = self.heads // self.groups
            first, last = first & (ids[3] == 0), last & (ids[3] == members - 1)
        return Visit((queries[place], keys[place]), kinds[place], first, last, prefix[ids[0]])


class Visit(NamedTuple):
    """The tile that is visited, its kind, whether it is the first and the last of its block, the prefix of its row."""

    tile: tuple[jax.Array, jax.Array]
    kind: jax.Array
    first: jax.Array
    last: jax.Array
    prefix: jax.Array

    def run(self, step: Callable[[bool], None]) -> None:
        """``step(mask)``: with a mask where some queries may not see some keys, not at all where there is nothing."""
        pl.when(self.kind == PARTLY)(lambda: step(True))
        pl.when(self.kind == WHOLLY)(lambda: step(False))


def parameters(tiles: Tiles) -> pltpu.CompilerParams:
    """Rows and heads may go to several cores, visits follow each other."""
    orders = ("parallel", "parallel", "arbitrary", "arbitrary")[: len(tiles.grid)]
    return pltpu.CompilerParams(dimension_semantics=orders, vmem_limit_bytes=VMEM_BYTES)
