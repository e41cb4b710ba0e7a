"""What the Mosaic GPU kernels of diagonal recurrences share: launching, streams of chunks, filling the chip.

A block is one warpgroup that owns some channels and walks along time. Where rows times channels make too few blocks to
fill the chip, the length is cut into spans, each walked by a block of its own, in three passes: every span from a zero
state gives its end state; `entering` chains these; every span again, from its own entering state.
"""

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
RESET = -1e30
"""Added to the exponent of a decay where a document starts: exp2 of the sum is 0."""

SHARED_BYTES = 232448 - 2048
"""What a block's buffers may take of the shared memory, with room for barriers and the compiler's scratch."""

_MULTIPROCESSORS = 132
_STAGES = 2


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
        interpret=plgpu.InterpretGPUParams(detect_races=True) if simulated else None,
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
    """Chunk after chunk of some arrays, loaded into two buffers in turn while the chunk before is worked on."""

    def __init__(self, sources, buffers, barriers, count):
        """sources: functions of the number of the step, giving the part of an array to load; buffers: [2, ...] each.
        count: of steps, at least 1."""
        self.parts = [(s, b) for s, b in zip(sources, buffers, strict=True) if b is not None]
        self.barriers, self.count = barriers, count

    @staticmethod
    def scratch(buffers: Mapping[str, tuple | None]) -> dict[str, object]:
        """Scratch of a stream: shape and dtype of what each step loads, by name; and "barriers"."""
        held = {name: b and plgpu.SMEM((_STAGES, *b[0]), b[1]) for name, b in buffers.items()}
        arrivals = sum(b is not None for b in buffers.values())
        return held | {"barriers": plgpu.Barrier(num_arrivals=arrivals, num_barriers=_STAGES)}

    def start(self):
        """Begin to load the first steps."""
        for step in range(min(_STAGES, self.count)):
            self._fetch(step, step)

    def wait(self, step) -> jax.Array:
        """The place of this step's chunk in the buffers, once it is there."""
        slot = jax.lax.rem(step, _STAGES)
        plgpu.barrier_wait(self.barriers.at[slot])
        return slot

    def release(self, step):
        """Begin to load over this step's chunk, which all warps have read: call `commit_smem` before."""

        @pl.when(step + _STAGES < self.count)
        def _():
            self._fetch(step + _STAGES, jax.lax.rem(step, _STAGES))

    def _fetch(self, step, slot):
        for source, buffer in self.parts:
            plgpu.copy_gmem_to_smem(source(step), buffer.at[slot], self.barriers.at[slot])


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
