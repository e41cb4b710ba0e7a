"""What tokens read: of the state in front of their chunk, and of the other tokens in it; all chunks at once.

    out = rows ∘ (left states) + pairs values,   pairs given, or tril(left rightᵀ ∘ decay between the tokens)

Linear attention is its own gradient: outputs read q, k, v and states; the gradients of q, k and v are the same
expression of other arrays, with states transposed, or from the last chunk to the first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.chunk_states.tiles import (
    CHUNK,
    COLUMNS,
    ROWS,
    WGMMA,
    along_columns,
    along_rows,
    floats,
    loop,
    product,
    quotient,
    remainder,
    tile,
    vector,
)
from kernels_pallas.hopper import interpreted

_SQUARE = (CHUNK, CHUNK)
_ONCE = ("values", "own", "numbers_rows", "numbers_columns")  # the same for all heads that a block adds up


class States(NamedTuple):
    """The state part: rows ∘ (left states), or with `turned` rows ∘ (left statesᵀ)."""

    states: jax.Array  # bfloat16 [B, N, H, K, V]
    turned: bool = False
    rows: jax.Array | None = None  # float32 [B, H, N, C]


class Given(NamedTuple):
    """pairs values, or with `reverse` pairsᵀ values."""

    pairs: jax.Array  # bfloat16 [B, N, H, C, C]
    values: jax.Array  # bfloat16 [B, T, H, X]


class Decayed(NamedTuple):
    """The pairs of `left` with `right`, times the decay from the earlier token to the later one."""

    right: jax.Array  # bfloat16 [B, T, G, A]
    values: jax.Array  # bfloat16 [B, T, G, X]
    sums: jax.Array  # float32 [B, H, N, C], of log2 of the decays within the chunk, up to the token
    numbers: jax.Array | None = None  # int32 [B, N, C]: tokens of other numbers do not meet


class Read(NamedTuple):
    """What comes of reading; None where it was not asked for."""

    out: jax.Array  # bfloat16 [B, T, H, X], or of H // summed heads
    pairs: jax.Array | None  # bfloat16 [B, N, H, C, C]
    dots: jax.Array | None  # float32 [2, B, H, N, C]


def read(
    left: jax.Array | None,
    states: States | None = None,
    pairs: Given | Decayed | None = None,
    *,
    heads: int,
    reverse: bool = False,
    emit: jax.Array | None = None,
    own: jax.Array | None = None,
    summed: int = 1,
    simulated: bool = False,
) -> Read:
    """Read states and pairs.

    Args:
        left: bfloat16 [B, T, G, A], for the state part and for decayed pairs; A is K, or V of turned states. Every
            array has its own number of groups, which divides `heads`.
        reverse: token i reads of tokens j >= i, else j <= i.
        emit: bfloat16 [B, T, H, A]: return tril(left emitᵀ) as `pairs` too.
        own: bfloat16 [B, T, G, X]: return sum(own ∘ what was read), in float32, of other tokens of the chunk and of
            the state, as `dots`.
        summed: how many consecutive heads, all of one group of values, a block goes through and adds up; for decayed
            pairs.
    """
    plan = _Plan(left, states, pairs, heads, reverse, emit is not None, own is not None, summed)
    arrays = {"left": left, "emit": emit, "own": own}
    if states is not None:
        arrays |= {"states": states.states, "rows": states.rows}
    if isinstance(pairs, Given):
        arrays |= {"pairs": pairs.pairs, "values": pairs.values}
    if isinstance(pairs, Decayed):
        arrays |= {"right": pairs.right, "values": pairs.values}
        # Per row and per column of the pairs: two buffers, for two layouts of registers.
        arrays |= {f"{name}_{axis}": value for name, value in plan.between(pairs) for axis in ("rows", "columns")}
    arrays = {name: value for name, value in arrays.items() if value is not None}
    plan.groups = {name: value.shape[2] for name, value in arrays.items() if value.ndim == 4}
    results = plgpu.kernel(
        plan.body(list(arrays)),
        out_type=plan.outputs(),
        grid=(plan.batch, plan.chunks, heads // summed, plan.width // plan.block),
        grid_names=("batch", "chunk", "head", "column"),
        scratch_types=plan.scratch(list(arrays)),
        kernel_name=f"chunk_states_read{'_decayed' * plan.decayed}{'_turned' * plan.turned}{'_back' * reverse}",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreted(simulated),
    )(*arrays.values())
    named = dict(zip(plan.results, results, strict=True))
    dots = jnp.moveaxis(jnp.sum(named["dots"], axis=3), 3, 0) if "dots" in named else None
    return Read(named["out"], named.get("emitted"), dots)


class _Plan:
    """The shapes of a call, and the kernel for them."""

    def __init__(self, left, states, pairs, heads, reverse, emits, dotted, summed):
        some = left if left is not None else pairs.values
        self.batch, self.time = some.shape[:2]
        self.chunks, self.heads, self.reverse = self.time // CHUNK, heads, reverse
        self.inner = left.shape[3] if left is not None else 0
        self.turned = states is not None and states.turned
        self.width = pairs.values.shape[3] if pairs is not None else states.states.shape[3 if self.turned else 4]
        self.summed, self.stages = summed, min(summed, 2)
        self.block = 128 if self.width % 128 == 0 and self.inner <= 128 and summed == 1 else 64
        self.decayed = isinstance(pairs, Decayed)
        self.results = ["out"] + ["emitted"] * emits + ["dots"] * dotted

    @staticmethod
    def between(pairs):
        return [("sums", pairs.sums)] + [("numbers", pairs.numbers)] * (pairs.numbers is not None)

    def outputs(self):
        batch, chunks, heads, count = self.batch, self.chunks, self.heads, self.width // self.block
        shapes = {
            "out": ((batch, self.time, heads // self.summed, self.width), jnp.bfloat16),
            "emitted": ((batch, chunks, heads, *_SQUARE), jnp.bfloat16),
            "dots": ((batch, heads, chunks, count, 2, CHUNK), jnp.float32),
        }
        return [jax.ShapeDtypeStruct(*shapes[name]) for name in self.results]

    def scratch(self, names):
        """What is loaded once, in stages for every head, and what is only written; and the barriers of the former two.

        What is read takes the place of the values, where there are any.
        """
        states = (self.block, self.inner) if self.turned else (self.inner, self.block)
        kinds = dict.fromkeys(("left", "right", "emit"), (CHUNK, self.inner))
        kinds |= dict.fromkeys(("values", "own", "out"), (CHUNK, self.block))
        kinds |= {"pairs": _SQUARE, "emitted": _SQUARE, "states": states}
        vectors = dict.fromkeys(("rows", "sums_rows", "sums_columns"), jnp.float32)
        vectors |= dict.fromkeys(("numbers_rows", "numbers_columns"), jnp.int32)

        def buffer(name, *stages):
            return plgpu.SMEM((*stages, CHUNK), vectors[name]) if name in vectors else tile(*stages, *kinds[name])

        written = ["pairs"] * self.decayed + ["out"] * ("values" not in names) + ["emitted"] * ("emit" in names)
        own = {name: buffer(name) for name in written}
        if "dots" in self.results:
            own["dots"] = plgpu.SMEM((2, CHUNK), jnp.float32)
        once = {name: buffer(name) for name in names if name in _ONCE}
        each = {name: buffer(name, self.stages) for name in names if name not in _ONCE}
        barriers = [plgpu.Barrier(num_arrivals=max(1, len(once)))]
        barriers.append(plgpu.Barrier(num_arrivals=max(1, len(each)), num_barriers=self.stages))
        return [once, each, own, *barriers]

    def part(self, name, array, step=0):
        """What a block reads or writes of an array, for its head number `step`."""
        row, chunk, place = (jax.lax.axis_index(axis) for axis in ("batch", "chunk", "column"))
        columns, block = pl.ds(place * self.block, self.block), jax.lax.axis_index("head")
        head = block * self.summed + step
        if name == "dots":
            return array.at[row, head, chunk, place]
        if name in ("pairs", "emitted"):
            return array.at[row, chunk, head]
        if name == "states":
            return array.at[row, chunk, head, *((columns,) if self.turned else (slice(None), columns))]
        if name in ("rows", "sums_rows", "sums_columns"):
            return array.at[row, head, chunk]
        if name in ("numbers_rows", "numbers_columns"):
            return array.at[row, chunk]
        group = block if name == "out" else quotient(head, self.heads // self.groups[name])
        part = (row, pl.ds(chunk * CHUNK, CHUNK), group)
        return array.at[part if name in ("left", "right", "emit") else (*part, columns)]

    def body(self, names):
        def body(*refs):
            *arrays, once, each, own, loaded_once, loaded = refs
            inputs = dict(zip(names, arrays, strict=False))
            outputs = dict(zip(self.results, arrays[len(names) :], strict=True))

            def fetch(step):
                slot = remainder(step, self.stages)
                for name, buffer in each.items():
                    plgpu.copy_gmem_to_smem(self.part(name, inputs[name], step), buffer.at[slot], loaded.at[slot])

            for name, buffer in once.items():
                plgpu.copy_gmem_to_smem(self.part(name, inputs[name]), buffer, loaded_once)
            for step in range(self.stages if each else 0):
                fetch(np.int32(step))
            if once:
                plgpu.barrier_wait(loaded_once)

            def head(step):
                slot = remainder(step, self.stages)
                if each:
                    plgpu.barrier_wait(loaded.at[slot])
                held = once | own | {name: buffer.at[slot] for name, buffer in each.items()}
                if "emitted" in outputs:
                    # The pairs are the same for every block of columns: the first one writes them.
                    self.emit(held, self.part("emitted", outputs["emitted"]))
                results = self.read(held)
                if "dots" in outputs:
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(own["dots"], self.part("dots", outputs["dots"], step))
                return results

            out = head(np.int32(0)) if self.summed == 1 else self.over_heads(head, fetch)
            if "dots" in outputs:
                total, diagonal = out
                out = total + along_rows(diagonal, total.shape) * floats(once["values"])
            place = once["values"] if once else own["out"]
            place[...] = out.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(place, self.part("out", outputs["out"]))
            plgpu.wait_smem_to_gmem(0)

        return body

    def over_heads(self, head, fetch):
        """The sum of `head(step)` over the heads of a block."""

        def add(step, totals):
            plgpu.wait_smem_to_gmem(0)  # the dots of the head before have left
            totals = jax.tree.map(jnp.add, totals, head(step))

            @pl.when(step + self.stages < self.summed)
            def _():
                fetch(step + self.stages)

            return totals

        totals = plgpu.layout_cast(jnp.zeros((CHUNK, self.block), jnp.float32), WGMMA)
        if "dots" in self.results:
            totals = totals, plgpu.layout_cast(jnp.zeros((CHUNK,), jnp.float32), ROWS)
        return loop(self.summed, add, totals)

    def emit(self, held, output):
        @pl.when(jax.lax.axis_index("column") == 0)
        def _():
            scores = product((held["left"], held["emit"].transpose((1, 0))))
            held["emitted"][...] = jnp.where(_order(False), scores, 0.0).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(held["emitted"], output)

    def read(self, held):
        """What the tokens of a chunk read, [64, block]; with `dots` without their own values, whose weights it adds."""
        shape = (CHUNK, self.block)
        left = held.get("left")
        states = held.get("states")
        if self.turned:
            states = states.transpose((1, 0))
        rows = along_rows(vector(held["rows"], ROWS), shape) if "rows" in held else None
        if self.decayed:
            diagonal = self.weigh(held)
        if "pairs" not in held:
            return product((left, states))
        pairs = held["pairs"].transpose((1, 0)) if self.reverse and not self.decayed else held["pairs"]
        if states is None:
            return product((pairs, held["values"]))
        if rows is None:
            return product((left, states), (pairs, held["values"]))
        inside, before = product((pairs, held["values"])), rows * product((left, states))
        if "dots" not in held:
            return inside + before
        own = floats(held["own"])
        held["dots"][0] = jnp.sum(own * inside, axis=1)
        held["dots"][1] = jnp.sum(own * before, axis=1)
        return inside + before, diagonal

    def weigh(self, held):
        """Put the decayed pairs in their place; returns their diagonal [64] if it is left out there, for `dots`."""
        scores = product((held["left"], held["right"].transpose((1, 0))))
        sums = along_rows(vector(held["sums_rows"], ROWS), _SQUARE)
        exponents = sums - along_columns(vector(held["sums_columns"], COLUMNS), _SQUARE)
        decays = jnp.exp2(jnp.minimum(-exponents if self.reverse else exponents, 0.0))
        seen = _order(self.reverse, strictly="dots" in held)
        if "numbers_rows" in held:
            numbers = along_rows(vector(held["numbers_rows"], ROWS), _SQUARE)
            seen &= numbers == along_columns(vector(held["numbers_columns"], COLUMNS), _SQUARE)
        held["pairs"][...] = jnp.where(seen, scores * decays, 0.0).astype(jnp.bfloat16)
        plgpu.commit_smem()
        if "dots" in held:
            rows, columns = _indices()
            return jnp.sum(jnp.where(rows == columns, scores, 0.0), axis=1)
        return None


def _indices():
    return [plgpu.broadcasted_iota(jnp.int32, _SQUARE, axis, layout=WGMMA) for axis in (0, 1)]


def _order(reverse: bool, *, strictly: bool = False):
    """Bool [64, 64]: column j is not after row i, or not before it if `reverse`; nor the same if `strictly`."""
    rows, columns = _indices()
    if reverse:
        rows, columns = columns, rows
    return rows > columns if strictly else rows >= columns
