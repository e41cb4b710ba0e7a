"""States in front of every chunk: a kernel that goes through the chunks of a row and head one after the other.

A block holds a part [128, 64] of the state in registers (float32) and does nothing but carry it on: what reads the
states runs afterwards, over all chunks at once (`read_gpu`). Where too few blocks would fill the chip, the length is
cut into spans. With `reverse` the same kernel carries the gradients of states from the last chunk to the first.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.chunk_states.tiles import (
    CHUNK,
    ROWS,
    WGMMA,
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
from kernels_pallas.scan_gpu import entering, spans

VALUES = 64
"""Columns of a state that a block holds."""


class Writes(NamedTuple):
    """A term keysᵀ (rows ∘ values) of the state after a chunk."""

    keys: jax.Array  # bfloat16 [B, T, G, K]
    values: jax.Array  # bfloat16 [B, T, H, V]
    rows: jax.Array | None = None  # float32 [B, H, N, C]


class Corrects(NamedTuple):
    """values' = values - sign reads S, and a term sign keysᵀ values' of the state after the chunk."""

    reads: jax.Array  # bfloat16 [B, T, H, K]
    keys: jax.Array  # bfloat16 [B, T, H, K]
    values: jax.Array  # bfloat16 [B, T, H, V]
    sign: int


class Advanced(NamedTuple):
    """What comes of going through the chunks; None where it was not asked for."""

    states: jax.Array | None  # bfloat16 [B, N, H, K, V], in front of each chunk in the order of going
    last: jax.Array  # float32 [B, H, K, V]
    values: jax.Array | None  # bfloat16 [B, T, H, V], the corrected values
    kept: jax.Array | None  # float32 [B, N, H, K], sums of state ∘ against over V


def advance(
    whole: jax.Array,
    state: jax.Array,
    writes: Writes | None = None,
    corrects: Corrects | None = None,
    against: jax.Array | None = None,
    *,
    reverse: bool = False,
    simulated: bool = False,
) -> Advanced:
    """S after a chunk = diag(whole) S + the terms, over the chunks in order, or from the last one on.

    Args:
        whole: float32 [B, N, H, K]. state: float32 [B, H, K, V] in front of the first chunk in the order of going.
        against: bfloat16 [B, N, H, K, V], other states to multiply with.
    """
    count = 1
    if corrects is None:
        (batch, chunks, heads, keys), values = whole.shape, state.shape[3]
        most = spans(batch * heads * (keys // _block(keys)) * (values // VALUES), chunks)
        count = max(n for n in range(1, most + 1) if chunks % n == 0)
    if count > 1:
        return _advance_spans(count, whole, state, writes, against, reverse=reverse, simulated=simulated)
    return _advance(whole, state, writes, corrects, against, reverse=reverse, simulated=simulated)


def _advance(whole, state, writes, corrects=None, against=None, *, reverse, simulated, only_last=False) -> Advanced:
    """One block for the whole length; with `only_last` nothing but the last state comes out."""
    plan = _Plan(whole.shape, state.shape, writes, corrects, against is not None, reverse, only_last)
    results = plgpu.kernel(
        plan.body,
        out_type=plan.outputs(),
        grid=(plan.batch, plan.heads, plan.keys // plan.block, plan.values // VALUES),
        grid_names=("batch", "head", "key", "value"),
        scratch_types=plan.scratch(),
        kernel_name="chunk_states_advance_back" if reverse else "chunk_states_advance",
        interpret=interpreted(simulated),
    )(state, *(value for value in (whole, *(writes or ()), *(corrects or ())[:3], against) if value is not None))
    named = dict(zip(plan.results, results, strict=True))
    kept = jnp.sum(named["kept"], axis=3) if "kept" in named else None
    return Advanced(named.get("states"), named["last"], named.get("corrected"), kept)


def _advance_spans(count, whole, state, writes, against, *, reverse, simulated) -> Advanced:
    """The length in `count` spans with a block each, as if they were rows: from a zero state for what they add to it,
    and again from the states that then enter them.
    """
    batch = whole.shape[0]

    def split(value):
        """[B, N or T, ...] as [B * count, N or T / count, ...]."""
        return value.reshape(batch * count, -1, *value.shape[2:])

    def joined(value):
        return None if value is None else value.reshape(batch, -1, *value.shape[2:])

    if writes.rows is not None:
        writes = writes._replace(rows=split(writes.rows.swapaxes(1, 2)).swapaxes(1, 2))
    writes = writes._replace(keys=split(writes.keys), values=split(writes.values))
    against = None if against is None else split(against)
    decays = jnp.prod(whole.reshape(batch, count, -1, *whole.shape[2:]), axis=2)[..., None]
    whole = split(whole)
    one = functools.partial(_advance, whole, writes=writes, reverse=reverse, simulated=simulated)
    ends = one(state=jnp.zeros((batch * count, *state.shape[1:]), state.dtype), only_last=True).last
    ends = ends.reshape(batch, count, *state.shape[1:])
    first = entering(decays, ends, state, reverse=reverse)
    got = one(state=first.reshape(batch * count, *state.shape[1:]), against=against)
    last = got.last.reshape(ends.shape)[:, 0 if reverse else -1]
    return Advanced(joined(got.states), last, None, joined(got.kept))


def _block(keys: int) -> int:
    """Rows of a state that a block holds, where it need not hold all."""
    return 128 if keys % 128 == 0 else 64


class _Plan:
    """The shapes of a call, and the kernel for them. Buffers and arrays are called by the names in `loads`."""

    stages = 2

    def __init__(self, whole, state, writes, corrects, against, reverse, only_last):
        self.batch, self.chunks = whole[:2]
        self.heads, self.keys, self.values = state[1:]
        # Corrections need all keys of a state in one block; terms that are only added do not.
        self.block = self.keys if corrects else _block(self.keys)
        self.repeats = self.heads // writes.keys.shape[2] if writes else 1
        self.scaled = writes is not None and writes.rows is not None
        self.sign = corrects.sign if corrects else 0
        self.reverse = reverse
        self.loads = ["whole"]
        self.loads += ["keys", "values"] * (writes is not None) + ["rows"] * self.scaled
        self.loads += ["corrected_reads", "corrected_keys", "corrected_values"] * (corrects is not None)
        self.loads += ["against"] * against
        self.results = (
            ["states"] * (not only_last) + ["last"] + ["corrected"] * (corrects is not None) + ["kept"] * against
        )

    def outputs(self):
        batch, chunks, heads, keys, values = self.batch, self.chunks, self.heads, self.keys, self.values
        shapes = {
            "states": ((batch, chunks, heads, keys, values), jnp.bfloat16),
            "last": ((batch, heads, keys, values), jnp.float32),
            "corrected": ((batch, chunks * CHUNK, heads, values), jnp.bfloat16),
            "kept": ((batch, chunks, heads, values // VALUES, keys), jnp.float32),
        }
        return [jax.ShapeDtypeStruct(*shapes[name]) for name in self.results]

    def scratch(self):
        """One buffer of `stages` for everything that is loaded, and what goes to the tensor cores or to memory."""
        stages, block = self.stages, self.block
        kinds = {"whole": plgpu.SMEM((stages, block), jnp.float32), "rows": plgpu.SMEM((stages, CHUNK), jnp.float32)}
        kinds |= {name: tile(stages, CHUNK, block) for name in ("keys", "corrected_reads", "corrected_keys")}
        kinds |= {name: tile(stages, CHUNK, VALUES) for name in ("values", "corrected_values")}
        kinds["against"] = tile(stages, block, VALUES)
        own = {"state": tile(block, VALUES)} if "states" in self.results else {}
        if self.scaled:
            own["scaled"] = tile(CHUNK, VALUES)
        if self.sign:
            own["corrected"] = tile(CHUNK, VALUES)
        if self.sign < 0:
            own["negated"] = tile(CHUNK, VALUES)
        if "kept" in self.results:
            own["kept"] = plgpu.SMEM((block,), jnp.float32)
        barrier = plgpu.Barrier(num_arrivals=len(self.loads), num_barriers=stages)
        return [{name: kinds[name] for name in self.loads}, own, barrier]

    def parts(self, arrays, chunk):
        """What a block reads and writes of each array in a chunk."""
        row, head = jax.lax.axis_index("batch"), jax.lax.axis_index("head")
        keys = pl.ds(jax.lax.axis_index("key") * self.block, self.block)
        values = pl.ds(jax.lax.axis_index("value") * VALUES, VALUES)
        tokens = pl.ds(chunk * CHUNK, CHUNK)
        index = {
            "whole": (row, chunk, head, keys),
            "keys": (row, tokens, quotient(head, self.repeats), keys),
            "rows": (row, head, chunk),
            "corrected_reads": (row, tokens, head, keys),
            "corrected_keys": (row, tokens, head, keys),
            "states": (row, chunk, head, keys, values),
            "against": (row, chunk, head, keys, values),
            "kept": (row, chunk, head, jax.lax.axis_index("value"), keys),
            "initial": (row, head, keys, values),
            "last": (row, head, keys, values),
        }
        index |= {name: (row, tokens, head, values) for name in ("values", "corrected_values", "corrected")}
        return {name: array.at[index[name]] for name, array in arrays.items()}

    def body(self, initial, *refs):
        *arrays, buffers, own, loaded = refs
        inputs = dict(zip(self.loads, arrays, strict=False))
        outputs = dict(zip(self.results, arrays[len(self.loads) :], strict=True))

        def place(step):
            return self.chunks - 1 - step if self.reverse else step

        def fetch(step, slot):
            for name, part in self.parts(inputs, place(step)).items():
                plgpu.copy_gmem_to_smem(part, buffers[name].at[slot], loaded.at[slot])

        for step in range(min(self.stages, self.chunks)):
            fetch(np.int32(step), step)

        def chunk(step, state):
            slot = remainder(step, self.stages)
            stage = {name: buffer.at[slot] for name, buffer in buffers.items()}
            plgpu.barrier_wait(loaded.at[slot])
            plgpu.wait_smem_to_gmem(0)  # what the chunk before left in `own` has been read
            state = self.step(state, stage, own, self.parts(outputs, place(step)))

            @pl.when(step + self.stages < self.chunks)
            def _():
                fetch(step + self.stages, slot)

            return state

        first = self.parts({"initial": initial}, 0)["initial"]
        state = loop(self.chunks, chunk, plgpu.load(first, layout=WGMMA, optimized=False))
        self.parts(outputs, 0)["last"][...] = state
        plgpu.wait_smem_to_gmem(0)

    def step(self, state, stage, own, outputs):
        """The state after a chunk. All that plain loads read is read before the first `commit_smem`."""
        shape = (self.block, VALUES)
        whole = along_rows(vector(stage["whole"], ROWS), shape)
        if "states" in outputs:
            own["state"][...] = state.astype(jnp.bfloat16)
        if self.scaled:
            rows = along_rows(vector(stage["rows"], ROWS), (CHUNK, VALUES))
            own["scaled"][...] = (floats(stage["values"]) * rows).astype(jnp.bfloat16)
        if "kept" in outputs:
            own["kept"][...] = jnp.sum(state * floats(stage["against"]), axis=1)
        if self.sign:
            wanted = floats(stage["corrected_values"])
        plgpu.commit_smem()
        if "states" in outputs:
            plgpu.copy_smem_to_gmem(own["state"], outputs["states"])
        if "kept" in outputs:
            plgpu.copy_smem_to_gmem(own["kept"], outputs["kept"])
        terms = []
        if "keys" in stage:
            terms.append((stage["keys"].transpose((1, 0)), own["scaled"] if self.scaled else stage["values"]))
        if self.sign:
            corrected = wanted - self.sign * product((stage["corrected_reads"], own["state"]))
            own["corrected"][...] = corrected.astype(jnp.bfloat16)
            if self.sign < 0:
                own["negated"][...] = (-corrected).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own["corrected"], outputs["corrected"])
            change = own["corrected"] if self.sign > 0 else own["negated"]
            terms.append((stage["corrected_keys"].transpose((1, 0)), change))
        return whole * state + product(*terms)
