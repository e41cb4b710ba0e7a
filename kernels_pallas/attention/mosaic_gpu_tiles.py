"""What the attention kernels for Hopper share: their options, tiles in shared memory, products, masks and schedules."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.attention.visibility import Visibility

ROWS = 64
"""Of a tile that one warpgroup works on."""
CONSUMERS = 2
"""Warpgroups of a block that compute; one more copies."""
TILE = CONSUMERS * ROWS
KEY_MARKS = ("key_ids", "key_ranks")
"""Of packed documents, int32 [B, S]; see `hide`."""
MASKED, MASKED_CAPPED = -1e38, -1e15
"""A hidden logit: finite, also squared where there is a softcap, and exp2 of it is 0 whatever it is scaled by."""
LAYOUT = plgpu.Layout.WGMMA
_COMPUTE_REGISTERS, _COPY_REGISTERS = 240, 24


@dataclasses.dataclass(frozen=True)
class Options:
    """What of a call is static.

    Attributes:
        rule: of `Visibility`.
        scale: above 0. softcap: as in `attention`.
        time, keys: the queries and keys there are; the arrays are filled up with zeros.
        blocks: tile sizes, see `mosaic_gpu.heuristic`.
        simulated: in the interpreter, which knows no products of registers.
    """

    rule: Visibility
    scale: float
    softcap: float | None
    time: int
    keys: int
    blocks: tuple[tuple[str, int], ...]
    simulated: bool

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]

    @property
    def base2(self) -> float:
        """What takes `capped` products to logits in base 2."""
        return (self.scale if self.softcap is None else self.softcap) * math.log2(math.e)

    def capped(self, products):
        """Products of queries and keys, or, with a softcap, the hyperbolic tangent of scaled ones."""
        if self.softcap is None:
            return products
        # tanh.approx errs by 5e-4, which a softcap of 50 turns into 2 % of a weight.
        rate = 2 * math.log2(math.e) * self.scale / self.softcap
        return 1 - 2 * (1 / (1 + jnp.exp2(products * rate)))


def tile(*shape: int, dtype) -> plgpu.SMEM:
    """Shared memory that wgmma reads; its last axis is a multiple of 32 (of 64 where it is larger)."""
    columns = min(64, shape[-1])
    swizzle = columns * jnp.dtype(dtype).itemsize
    transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def mark_tiles(marks: Mapping, names: Sequence[str], stages: int, size: int) -> dict[str, plgpu.SMEM]:
    """Shared memory for those marks of the names that there are."""
    return {f"{name}_tile": plgpu.SMEM((stages, size), jnp.int32) for name in names if marks[name] is not None}


def product(left, right, shape: tuple[int, int], meanwhile: Callable[[], None] = lambda: None):
    """`left` times `right` (a tile, or a transposed one), float32, in registers; `meanwhile` runs beside it."""

    def run(sums):
        plgpu.wgmma(sums, left, right)
        meanwhile()
        return sums[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def staged(value, tile):
    """A left operand: where there is a tile, moved there, else `value` in registers itself."""
    if tile is None:
        return value
    tile[...] = value
    plgpu.commit_smem()
    return tile


def key_marks(refs, suffix: str, place, axis: int) -> list:
    """Vectors of `KEY_MARKS`, None for absent ones: of the arrays, or of their tiles if that is the suffix."""
    return [refs[name] if refs[name] is None else load(refs[name + suffix].at[place], axis) for name in KEY_MARKS]


def fill(shape: tuple[int, ...], value):
    """A constant in the layout of products, or of their rows."""
    layout = LAYOUT if len(shape) == 2 else LAYOUT.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def rows(vector, shape: tuple[int, int]):
    """[M] to [M, N]."""
    return jax.lax.broadcast_in_dim(vector, shape, [0])


def columns(vector, shape: tuple[int, int]):
    """[N] to [M, N]."""
    return jax.lax.broadcast_in_dim(vector, shape, [1])


def load(ref, axis: int):
    """A vector in memory, to lie along an axis of a tile."""
    return plgpu.load(ref, layout=LAYOUT.reduce(1 - axis), optimized=False)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The tiles that a block of threads visits: a row of `visits.stretches`, in scalar registers."""

    first: jax.Array
    count: jax.Array
    next_first: jax.Array
    next_count: jax.Array
    full_first: jax.Array
    full_end: jax.Array

    @classmethod
    def read(cls, stretches, batch, index) -> "Schedule":
        """Of int32 [1|B, rows, 6] in global memory."""
        row = batch if stretches.shape[0] > 1 else 0
        return cls(*(stretches[row, index, i] for i in range(6)))

    @property
    def steps(self):
        """How many tiles there are to visit."""
        return self.count + self.next_count

    def at(self, step):
        """The tile of a step."""
        return jnp.where(step < self.count, self.first + step, self.next_first + step - self.count)

    def full(self, tile):
        """Whether nothing of a tile is hidden."""
        return (tile >= self.full_first) & (tile < self.full_end)


def hide(options: Options, logits, schedule: Schedule, tile, *, query, key, prefix, ids, axis: int):
    """`logits` of a tile, hidden ones where the query does not see the key; full tiles are left alone.

    Args:
        tile: its number, of those `schedule` knows. query, key: its first ones. axis: that of the queries.
        prefix: the scalar of the row of the batch, or None. ids: None or a function for vectors of the queries' and the
            keys' documents, and of the keys' ranks in theirs (None where these do not matter).
    """
    hidden = MASKED if options.softcap is None else MASKED_CAPPED

    def along(vector, axis):
        return None if vector is None else jax.lax.broadcast_in_dim(vector, logits.shape, [axis])

    def masked(logits):
        query_at, key_at = (
            plgpu.broadcasted_iota(jnp.int32, logits.shape, dimension, layout=LAYOUT) for dimension in (axis, 1 - axis)
        )
        position = query_at + (query + options.keys - options.time)
        of_queries, of_keys, ranks = (None, None, None) if ids is None else ids()
        rank = key_at + key if ranks is None else along(ranks, 1 - axis)
        seen = options.rule.sees(
            position, key_at + key, rank, prefix, along(of_queries, axis), along(of_keys, 1 - axis)
        )
        if not options.rule.causal and ids is None:
            filled = key_at < options.keys - key
            seen = filled if seen is None else seen & filled
        return jnp.where(seen, logits, hidden)

    return jax.lax.cond(schedule.full(tile), lambda logits: logits, masked, logits)


def launch(
    body: Callable,
    options: Options,
    inputs: Mapping[str, jax.Array | None],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    scratch: Mapping[str, object],
    grid: Mapping[str, int],
    name: str,
    threads: int = CONSUMERS + 1,
) -> list[jax.Array]:
    """Run ``body(refs)`` on blocks of so many warpgroups; `refs` maps names, also of absent inputs, to Refs."""
    given = {key: value for key, value in inputs.items() if value is not None}
    held = {key: value for key, value in scratch.items() if value is not None}
    absent = dict.fromkeys((*inputs, *scratch))

    def kernel(*refs, **scratch):
        body({**absent, **dict(zip((*given, *outputs), refs, strict=True)), **scratch})

    return plgpu.kernel(
        kernel,
        out_type=list(outputs.values()),
        scratch_types=held,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=threads,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if options.simulated else None,
        kernel_name=name,
    )(*given.values())


def warpgroups(compute: Callable, copy: Callable) -> None:
    """Run ``compute(index)`` on the first warpgroups and ``copy()`` on the last, each with its share of registers."""
    index = jax.lax.axis_index("warpgroup")

    @pl.when(index < CONSUMERS)
    def _():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        compute(index)

    @pl.when(index == CONSUMERS)
    def _():
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
        copy()


def ring(name: str, stages: int, copies: int) -> dict[str, plgpu.Barrier]:
    """The barriers of tiles that are filled again and again: ``NAME_ready`` of the copies, ``NAME_free`` of readers."""
    ready = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    return {f"{name}_ready": ready, f"{name}_free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)}


def slot_of(refs, name: str, number):
    """The tile of a ring that a step uses."""
    return unknown(jax.lax.rem(number, jnp.int32(refs[f"{name}_free"].shape[0])))


def unknown(scalar):
    """A scalar that the compiler cannot tell is the same in every step.

    It would compute the descriptors of constant tiles, four registers for every 16 columns, once and keep them all.
    """
    return jax.lax.optimization_barrier(scalar)


def fetch(refs, name: str, number, places: Mapping[str, tuple]) -> None:
    """Copy what a step needs into a ring, once what was there is read: of each input, unless it is absent, a place."""
    slot = slot_of(refs, name, number)

    @pl.when(number >= refs[f"{name}_free"].shape[0])
    def _():
        plgpu.barrier_wait(refs[f"{name}_free"].at[slot])

    for source, place in places.items():
        if refs[source] is not None:
            target = refs[f"{source}_tile"].at[slot]
            plgpu.copy_gmem_to_smem(refs[source].at[place], target, refs[f"{name}_ready"].at[slot])


def release(refs, name: str, slot, *, loaded: bool) -> None:
    """Hand a tile of a ring back. Copies follow the products that read it, but plain loads of it only after a fence."""
    if loaded:
        plgpu.commit_smem()
    plgpu.barrier_arrive(refs[f"{name}_free"].at[slot])


def drain(refs, name: str, steps) -> None:
    """Wait until what was copied last is read, so that no barrier is left in the middle of a phase."""

    def step(number, _):
        plgpu.barrier_wait(refs[f"{name}_free"].at[slot_of(refs, name, number)])
        return ()

    jax.lax.fori_loop(jnp.maximum(steps - refs[f"{name}_free"].shape[0], 0), steps, step, ())


def own(refs, places: Mapping[str, tuple], warpgroup) -> None:
    """Copy what a warpgroup keeps, and wait for it: of each input, unless it is absent, a place."""
    for source, place in places.items():
        if refs[source] is not None:
            target = refs[f"{source}_tile"].at[warpgroup]
            plgpu.copy_gmem_to_smem(refs[source].at[place], target, refs["own"].at[warpgroup])
    plgpu.barrier_wait(refs["own"].at[warpgroup])


def store(value, tile, target) -> None:
    """Registers to global memory, by way of a tile."""
    tile[...] = value.astype(tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, target)
