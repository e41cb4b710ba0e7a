"""Recurrent operators on TPUs: a fold over chunks of tokens, the state in VMEM from one chunk to the next.

The grid is (rows, blocks, chunks). A block is what of an operator has a state of its own: some channels, or some heads.
A TPU runs the last axis in order, so the state stays in scratch memory; the other two are independent. The forward
kernel leaves the state in front of every chunk, if there will be a backward one; that one walks from the last chunk to
the first with the gradient of the state in scratch, and computes everything else again.

All values are matrices: Mosaic has no vectors without a tile.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
TOKENS = 16
"""Rows of a tile of bfloat16: every chunk is a multiple."""

interpreter = jax.make_user_context(default_value=True)
"""What simulated kernels run in: True, quick, or a `pltpu.InterpretParams`, which simulates memory and finds races."""


class Tokens(NamedTuple):
    """How the chunks of an array lie.

    Attributes:
        width: of a block. parts: how many blocks there are; fewer than the grid has where some share one.
        across: tokens run along lanes: array [B, parts, chunks, width, chunk]; else down, array [B, T, parts * width].
        turned: the gradient of an array that lies down comes across.
        scalars: in the memory of scalars.
    """

    width: int
    parts: int = 1
    across: bool = False
    turned: bool = False
    scalars: bool = False

    def shape(self, batch: int, chunks: int, chunk: int) -> tuple[int, ...]:
        """Of the whole array."""
        if self.across:
            return batch, self.parts, chunks, self.width, chunk
        return batch, chunks * chunk, self.parts * self.width

    def spec(self, blocks: int, chunk: int, place: Callable) -> pl.BlockSpec:
        """Of the chunk at `place(step)`."""
        space = pltpu.SMEM if self.scalars else pltpu.VMEM

        def part(j):
            return jax.lax.div(j, blocks // self.parts)

        if self.across:
            shape = None, None, None, self.width, chunk
            return pl.BlockSpec(shape, lambda b, j, t: (b, part(j), place(t), 0, 0), memory_space=space)
        return pl.BlockSpec((None, chunk, self.width), lambda b, j, t: (b, place(t), part(j)), memory_space=space)

    def gradient(self, blocks: int) -> "Tokens":
        """Where the blocks of the grid put theirs, each its own."""
        return self._replace(parts=blocks, across=self.across or self.turned, turned=False)

    def collect(self, gradient, like):
        """The gradient of the array, summed over the blocks that share one."""
        if self.across or self.turned:
            batch, blocks, chunks, _, chunk = gradient.shape
            gradient = gradient.reshape(batch, self.parts, blocks // self.parts, chunks, self.width, chunk).sum(2)
            if self.turned:
                gradient = gradient.transpose(0, 2, 4, 1, 3).reshape(like.shape)
            return gradient.astype(like.dtype)
        return (
            gradient.reshape(*like.shape[:2], self.parts, -1, self.width).sum(3).reshape(like.shape).astype(like.dtype)
        )


class Rule(NamedTuple):
    """What happens to one chunk; functions at module level, so that programs are shared.

    States are values; inputs, marks, shared arrays and all results but the state are references to VMEM.

    forward: (state, marks, inputs, shared, y) -> state.
    backward: (state, marks, inputs, shared, dstate, dy, dinputs, dshared, scratch) -> dstate. It sets dinputs, and adds
        to dshared.
    """

    forward: Callable
    backward: Callable


class Plan(NamedTuple):
    """The layout of a call.

    Attributes:
        name: of the operator. chunk: tokens. inputs, y, marks: how they lie. dtype: of y.
        scratch: (chunk, shape of the state) -> shapes of float32 scratch of the backward kernel.
        interpret: see `interpreter`; False on a TPU.
    """

    name: str
    rule: Rule
    chunk: int
    inputs: tuple[Tokens, ...]
    y: Tokens
    dtype: Any
    marks: Tokens | None = None
    scratch: Callable | None = None
    interpret: Any = False


def on_values(forward: Callable, backward: Callable | None = None) -> Rule:
    """The rule of functions on values: (state, marks, inputs, shared) -> (state, y), and its gradient.

    `backward` takes (state, marks, inputs, shared, dstate, dy) and returns (dstate, dinputs, dshared); without one it
    is the derivative of `forward`, taken inside of the kernel.
    """

    def read(refs):
        return jax.tree.map(lambda ref: ref[...], refs)

    def derived(state, marks, inputs, shared, dstate, dy):
        def run(state, inputs, shared):
            return forward(state, marks, inputs, shared)

        return jax.vjp(run, state, inputs, shared)[1]((dstate, dy))

    def write(state, marks, inputs, shared, y):
        state, value = forward(state, *read((marks, inputs, shared)))
        y[...] = value.astype(y.dtype)
        return state

    def write_gradients(state, marks, inputs, shared, dstate, dy, dinputs, dshared, scratch):
        values = read((marks, inputs, shared))
        given = dy[...] if backward else dy[...].astype(jnp.float32)
        dstate, new, total = (backward or derived)(state, *values, dstate, given)
        for ref, value in zip(dinputs, new, strict=True):
            ref[...] = value.astype(ref.dtype)
        for ref, value in zip(dshared, total, strict=True):
            ref[...] += value
        return dstate

    return Rule(write, write_gradients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fold(plan: Plan, state: jax.Array, marks, inputs: tuple, shared: tuple):
    """Fold a rule over chunks.

    Args:
        state: float32 [B, blocks, M, N], before the first token.
        marks: an array that has no gradient, or None.
        inputs: arrays as `plan.inputs` has them, filled up to whole chunks with what leaves a state as it is.
        shared: arrays [blocks, ...] that every chunk of every row reads.

    Returns:
        y as `plan.y` has it, and the state after the last token.
    """
    return _call_forward(plan, state, marks, inputs, shared, keep=False)[:2]


def _forward_kernel(forward, keep, initial, marks, inputs, shared, y, last, *rest):
    *states, state = rest
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        state[...] = initial[...]

    if keep:
        states[0][...] = state[...]
    state[...] = forward(state[...], marks, inputs, shared, y)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        last[...] = state[...]


def _backward_kernel(backward, states, marks, inputs, shared, dlast, dy, dinputs, dshared, dinitial, dstate, *scratch):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        dstate[...] = dlast[...]
        for total in dshared:
            total[...] = jnp.zeros_like(total)

    dstate[...] = backward(states[...], marks, inputs, shared, dstate[...], dy, dinputs, dshared, scratch)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        dinitial[...] = dstate[...]


class _Specs(NamedTuple):
    """The blocks of a call, for chunks in one or the other order."""

    state: pl.BlockSpec
    states: pl.BlockSpec
    marks: pl.BlockSpec | None
    inputs: tuple
    shared: tuple
    y: pl.BlockSpec


def _specs(plan, state, shared, chunks, *, reverse):
    blocks, tile = state.shape[1], state.shape[2:]

    def place(t):
        return chunks - 1 - t if reverse else t

    def spec(layout):
        return layout.spec(blocks, plan.chunk, place)

    return _Specs(
        pl.BlockSpec((None, None, *tile), lambda b, j, t: (b, j, 0, 0)),
        pl.BlockSpec((None, None, None, *tile), lambda b, j, t: (b, j, place(t), 0, 0)),
        None if plan.marks is None else spec(plan.marks),
        tuple(map(spec, plan.inputs)),
        tuple(pl.BlockSpec((None, *x.shape[1:]), lambda b, j, t: (j, 0, 0)) for x in shared),
        spec(plan.y),
    )


def _chunks(plan, inputs):
    """How many chunks there are."""
    layout, value = plan.inputs[0], inputs[0]
    return value.shape[2] if layout.across else value.shape[1] // plan.chunk


def _run(plan, name, kernel, grid, in_specs, out_specs, out_shape, scratch, arguments):
    order = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
    scratch = [pltpu.VMEM(shape, jnp.float32) for shape in scratch]
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=order,
        interpret=plan.interpret,
        name=f"{plan.name}_{name}",
    )(*arguments)


def _call_forward(plan, state, marks, inputs, shared, *, keep):
    batch, blocks, *tile = state.shape
    chunks = _chunks(plan, inputs)
    specs = _specs(plan, state, shared, chunks, reverse=False)
    out_specs = [specs.y, specs.state] + [specs.states] * keep
    out_shape = [
        jax.ShapeDtypeStruct(plan.y.shape(batch, chunks, plan.chunk), plan.dtype),
        jax.ShapeDtypeStruct(state.shape, state.dtype),
    ] + [jax.ShapeDtypeStruct((batch, blocks, chunks, *tile), state.dtype)] * keep
    kernel = functools.partial(_forward_kernel, plan.rule.forward, keep)
    in_specs = [specs.state, specs.marks, specs.inputs, specs.shared]
    arguments = state, marks, inputs, shared
    grid = batch, blocks, chunks
    return _run(plan, "forward", kernel, grid, in_specs, out_specs, out_shape, [tuple(tile)], arguments)


def _forward(plan, state, marks, inputs, shared):
    y, last, states = _call_forward(plan, state, marks, inputs, shared, keep=True)
    return (y, last), (states, marks, inputs, shared)


def _backward(plan, residuals, cotangents):
    states, marks, inputs, shared = residuals
    dy, dlast = cotangents
    batch, blocks, *tile = dlast.shape
    chunks = _chunks(plan, inputs)
    specs = _specs(plan, dlast, shared, chunks, reverse=True)
    own = [layout.gradient(blocks) for layout in plan.inputs]

    def out(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    out_shape = (
        tuple(
            out(
                new.shape(batch, chunks, plan.chunk), x.dtype if old.parts == blocks and not old.turned else jnp.float32
            )
            for new, old, x in zip(own, plan.inputs, inputs, strict=True)
        ),
        tuple(out((batch, *x.shape)) for x in shared),
        out(dlast.shape),
    )
    out_specs = (
        tuple(layout.spec(blocks, plan.chunk, lambda t: chunks - 1 - t) for layout in own),
        tuple(pl.BlockSpec((None, None, *x.shape[1:]), lambda b, j, t: (b, j, 0, 0)) for x in shared),
        specs.state,
    )
    in_specs = [specs.states, specs.marks, specs.inputs, specs.shared, specs.state, specs.y]
    scratch = [tuple(tile), *(plan.scratch(plan.chunk, tile) if plan.scratch else ())]
    dinputs, dshared, dinitial = _run(
        plan,
        "backward",
        functools.partial(_backward_kernel, plan.rule.backward),
        (batch, blocks, chunks),
        in_specs,
        out_specs,
        out_shape,
        scratch,
        (states, marks, inputs, shared, dlast, dy),
    )
    dinputs = tuple(layout.collect(new, x) for layout, new, x in zip(plan.inputs, dinputs, inputs, strict=True))
    return dinitial, None, dinputs, tuple(new.sum(0).astype(x.dtype) for new, x in zip(dshared, shared, strict=True))


fold.defvjp(_forward, _backward)


def chunk_size(wanted: int, time: int, *, power_of_two: bool = False) -> int:
    """The chunk that a kernel takes for the wanted one: whole tiles, and not much longer than the row."""
    size = min(filled(wanted, TOKENS), filled(time, TOKENS))
    return 1 << (size - 1).bit_length() if power_of_two else size


def filled(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def fill(value, axis: int, multiple: int):
    """`value` with zeros at the end of an axis, up to the next multiple."""
    missing = filled(value.shape[axis], multiple) - value.shape[axis]
    pads = [(0, 0)] * value.ndim
    pads[axis] = 0, missing
    return jnp.pad(value, pads) if missing else value


def channel_block(channels: int, wanted: int) -> int:
    """How many of the channels, a multiple of 128, are in a block: at most as many as wanted, and all blocks full."""
    return max(size for size in range(LANES, max(wanted, LANES) + 1, LANES) if channels % size == 0)


def roll(value, shift: int):
    """Row t of the result is row t - shift; what falls out at one end comes in at the other. float32."""
    return _roll(shift % value.shape[0], value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _roll(shift, value):
    return pltpu.roll(value, shift, 0)


_roll.defvjp(
    lambda shift, value: (_roll(shift, value), None), lambda shift, _, change: (roll(change, change.shape[0] - shift),)
)


def simulation(simulated: bool):
    """What `Plan.interpret` is."""
    return interpreter.value if simulated else False
