"""What the Mosaic GPU kernels of diagonal recurrences share: launching, streams of chunks, filling the chip.

A block is one warpgroup that owns some channels and walks along time. Where rows times channels make too few blocks to
fill the chip, the length is cut into spans, each walked by a block of its own, in three passes: every span from a zero
state gives its end state; `entering` chains these; every span again, from its own entering state.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.hopper import interpreted

LOG2E = math.log2(math.e)
RESET = -1e30
"""Added to the exponent of a decay where a document starts: exp2 of the sum is 0."""

SHARED_BYTES = 232448 - 2048
"""What a block's buffers may take of the shared memory, with room for barriers and the compiler's scratch."""

_MULTIPROCESSORS = 132
_STAGES = 2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one call is cut; all sizes after padding. Operators add what is theirs.

    Attributes:
        groups: of channels. width: channels of a group. block: groups of a block.
        chunk: tokens that are loaded at once, a multiple of 8.
        length: chunks of a span. spans: blocks along a row.
        simulated: in the interpreter.
    """

    batch: int
    groups: int
    width: int
    chunk: int
    length: int
    spans: int
    simulated: bool
    block: ClassVar[int] = 1

    @property
    def time(self) -> int:
        """T: tokens of a row."""
        return self.spans * self.length * self.chunk

    @property
    def channels(self) -> int:
        """D: of all groups."""
        return self.groups * self.width

    @property
    def own(self) -> tuple[int, ...]:
        """Shape of a block's channels."""
        return (self.width,) if self.block == 1 else (self.block, self.width)

    @property
    def grid(self) -> dict[str, int]:
        """Blocks of the chip."""
        return {"row": self.batch, "group": self.groups // self.block, "span": self.spans}

    def here(self):
        """In a kernel: row, group (a slice if a block has several) and span of this block."""
        row, group, span = (jax.lax.axis_index(name) for name in self.grid)
        return row, group if self.block == 1 else pl.ds(group * self.block, self.block), span

    def grouped(self, value: jax.Array) -> jax.Array:
        """[...,D] -> [...,G,W], filled with zeros."""
        value = fill(value, **{f"axis{value.ndim - 1}": self.channels})
        return value.reshape(*value.shape[:-1], self.groups, self.width)

    def tokens(self, value: jax.Array) -> jax.Array:
        """[B,T,D] -> [B,T,G,W], filled with zeros."""
        return self.grouped(fill(value, axis1=self.time))


def launch(
    body: Callable[[SimpleNamespace], None],
    inputs: Mapping[str, jax.Array | None],
    outputs: Mapping[str, jax.ShapeDtypeStruct | None],
    scratch: Mapping[str, object],
    grid: Mapping[str, int],
    *,
    simulated: bool,
) -> dict[str, jax.Array | None]:
    """Run a kernel whose body finds its references by name; what is None is None there too.

    The body places its barriers between the warps itself: `commit_smem` after writes that others read, and before a
    buffer that others have read is filled anew.
    """
    given = [name for name, value in inputs.items() if value is not None]
    made = [name for name, value in outputs.items() if value is not None]
    kept = [name for name, value in scratch.items() if value is not None]

    def kernel(*references):
        absent = dict.fromkeys([*inputs, *outputs, *scratch])
        body(SimpleNamespace(**absent | dict(zip([*given, *made, *kept], references, strict=True))))

    kernel.__name__ = body.__name__
    results = plgpu.kernel(
        kernel,
        out_type=[outputs[name] for name in made],
        scratch_types=[scratch[name] for name in kept],
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpreted(simulated),
    )(*(inputs[name] for name in given))
    return dict.fromkeys(outputs) | dict(zip(made, results, strict=True))


def exp2(x: jax.Array, layout, *, simulated: bool) -> jax.Array:
    """2^x by the special-function instruction alone: without the four instructions around it that keep results below
    2^-126, which are 0 here. `layout` is that of x."""
    if simulated:
        return jnp.exp2(x)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout))
    def power(_, x):
        return x.exp2(approx=True)

    return power(x)


class Stream:
    """Chunk after chunk of a span of some arrays, loaded into two buffers in turn while the one before is worked on.

    An array NAME is [B,T], [B,T,...] or [B,T,G,...] with rank 4, of whose G groups of channels a block has its own; its
    buffers are NAME_, see `buffers`.
    """

    def __init__(self, plan: Plan, references: SimpleNamespace, *names: str, reverse: bool = False):
        """reverse: from the last chunk on."""
        every = [(getattr(references, name), getattr(references, f"{name}_")) for name in names]
        self.pairs = [pair for pair in every if pair[0] is not None]
        self.plan, self.reverse, self.barriers = plan, reverse, references.barriers

    def start(self):
        """Begin to load the first chunks."""
        for step in range(min(_STAGES, self.plan.length)):
            self._fetch(step, step)

    def chunk(self, step):
        """The number of the step's chunk in its row."""
        length = self.plan.length
        return self.plan.here()[2] * length + (length - 1 - step if self.reverse else step)

    def tokens(self, step):
        """The tokens of the step's chunk in its row."""
        return pl.ds(self.chunk(step) * self.plan.chunk, self.plan.chunk)

    def wait(self, step) -> jax.Array:
        """The place of the step's chunk in the buffers, once it is there."""
        slot = jax.lax.rem(step, _STAGES)
        plgpu.barrier_wait(self.barriers.at[slot])
        return slot

    def release(self, step):
        """Begin to load over the step's chunk, which all warps have read: call `commit_smem` before."""

        @pl.when(step + _STAGES < self.plan.length)
        def _():
            self._fetch(step + _STAGES, jax.lax.rem(step, _STAGES))

    def _fetch(self, step, slot):
        row, groups, _ = self.plan.here()
        for array, buffer in self.pairs:
            part = (row, self.tokens(step), groups)[: 3 if len(array.shape) == 4 else 2]
            plgpu.copy_gmem_to_smem(array.at[part], buffer.at[slot], self.barriers.at[slot])


def buffers(plan: Plan, **arrays: jax.Array | None) -> dict[str, object]:
    """Scratch of a `Stream` of these arrays."""

    def memory(value):
        if value is None:
            return None
        return plgpu.SMEM((_STAGES, plan.chunk, *(plan.own if value.ndim == 4 else value.shape[2:])), value.dtype)

    arrivals = sum(value is not None for value in arrays.values())
    barriers = plgpu.Barrier(num_arrivals=arrivals, num_barriers=_STAGES)
    return {f"{name}_": memory(value) for name, value in arrays.items()} | {"barriers": barriers}


def fold_tokens(count: int, token: Callable, carry, *, unrolled: int = 4):
    """Fold ``carry = token(t, carry)`` over `count` tokens, a multiple of `unrolled`."""

    def some(i, carry):
        for j in range(unrolled):
            carry = token(i * unrolled + j, carry)
        return carry

    return jax.lax.fori_loop(0, count // unrolled, some, carry)


def cut(time: int, chunk: int, count: int) -> tuple[int, int]:
    """Chunks of a span, and spans, for about `count` spans."""
    chunks = -(-time // chunk)
    length = -(-chunks // min(count, chunks))
    return length, -(-chunks // length)


def spans(blocks: int, chunks: int) -> int:
    """Into how many spans to cut a length of `chunks`, given the `blocks` that there are without.

    1 if every multiprocessor has a block: three passes take twice the exponentials of one. Otherwise about as many as
    make two blocks per multiprocessor, of at least four chunks, and such that nothing need be filled up if possible.
    """
    if blocks >= _MULTIPROCESSORS:
        return 1
    most = max(1, min(2 * _MULTIPROCESSORS // blocks, chunks // 4))
    return next((count for count in range(most, most // 2, -1) if chunks % count == 0), most)


def entering(decays: jax.Array, ends: jax.Array, state: jax.Array, *, reverse: bool = False) -> jax.Array:
    """The states that enter every span [B, S, ...].

    Args:
        decays: [B, S, ...] what a span leaves of the state that enters it. ends: its end state from a zero state.
        state: [B, ...] entering the first span, the last if `reverse`.
    """

    def join(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    decays, ends = jax.lax.associative_scan(join, (decays, ends), axis=1, reverse=reverse)
    after, state = decays * state[:, None] + ends, state[:, None]
    return jnp.concatenate([after[:, 1:], state] if reverse else [state, after[:, :-1]], axis=1)


def fill(value: jax.Array, **sizes: int) -> jax.Array:
    """Zeros appended so that the axes have these sizes; axes are named `axis0`, `axis1`, ..."""
    missing = [(0, sizes.get(f"axis{axis}", size) - size) for axis, size in enumerate(value.shape)]
    return jnp.pad(value, missing) if any(end for _, end in missing) else value
