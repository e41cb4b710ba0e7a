"""States in front of every chunk: a kernel that goes through the chunks of a row and head one after the other.

A block holds a part [K, 64] of the state in registers (float32) and does nothing but carry it on: what reads the states
runs afterwards, over all chunks at once (`read_gpu`). With `reverse` the same kernel carries the gradients of states
from the last chunk to the first.
"""

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
    interpreter,
    loop,
    product,
    quotient,
    remainder,
    tile,
    vector,
)

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

    states: jax.Array  # bfloat16 [B, N, H, K, V], in front of each chunk in the order of going
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
    plan = _Plan(whole.shape, state.shape, writes, corrects, against is not None, reverse)
    results = plgpu.kernel(
        plan.body,
        out_type=plan.outputs(),
        grid=(plan.batch, plan.heads, plan.keys // plan.block, plan.values // VALUES),
        grid_names=("batch", "head", "key", "value"),
        scratch_types=plan.scratch(),
        kernel_name="chunk_states_advance_back" if reverse else "chunk_states_advance",
        interpret=interpreter(simulated),
    )(state, *(value for value in (whole, *(writes or ()), *(corrects or ())[:3], against) if value is not None))
    named = dict(zip(plan.results, results, strict=True))
    kept = jnp.sum(named["kept"], axis=3) if "kept" in named else None
    return Advanced(named["states"], named["last"], named.get("corrected"), kept)


class _Plan:
    """The shapes of a call, and the kernel for them. Buffers and arrays are called by the names in `loads`."""

    stages = 2

    def __init__(self, whole, state, writes, corrects, against, reverse):
        self.batch, self.chunks = whole[:2]
        self.heads, self.keys, self.values = state[1:]
        # Corrections need all keys of a state in one block; terms that are only added do not.
        self.block = self.keys if corrects else 64 * (2 if self.keys % 128 == 0 else 1)
        self.repeats = self.heads // writes.keys.shape[2] if writes else 1
        self.scaled = writes is not None and writes.rows is not None
        self.sign = corrects.sign if corrects else 0
        self.reverse = reverse
        self.loads = ["whole"]
        self.loads += ["keys", "values"] * (writes is not None) + ["rows"] * self.scaled
        self.loads += ["corrected_reads", "corrected_keys", "corrected_values"] * (corrects is not None)
        self.loads += ["against"] * against
        self.results = ["states", "last"] + ["corrected"] * (corrects is not None) + ["kept"] * against

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
        own = {"state": tile(block, VALUES)}
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
        own["state"][...] = state.astype(jnp.bfloat16)
        if self.scaled:
            rows = along_rows(vector(stage["rows"], ROWS), (CHUNK, VALUES))
            own["scaled"][...] = (floats(stage["values"]) * rows).astype(jnp.bfloat16)
        if "kept" in outputs:
            own["kept"][...] = jnp.sum(state * floats(stage["against"]), axis=1)
        if self.sign:
            wanted = floats(stage["corrected_values"])
        plgpu.commit_smem()
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
