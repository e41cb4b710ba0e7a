"""Recurrent operators whose tokens are divided over devices: each runs its own, and states travel.

Every device first runs its tokens from a zero state. What a row's tokens on one device make of a state in front of them
is linear in it, so that all devices together need one exchange: of the states behind their tokens and of what their
tokens would make of another one (as chunks of one device do, Dao & Gu 2024, arXiv 2405.21060, section 8.2). From these
each computes the state in front of its own tokens, and adds what that changes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.partition import MESH_AXES, Axes, divided, partitioned
from kernels_pallas.segments import documents

(AXIS,) = MESH_AXES["time"]
ROWS = ("batch", "time")


def over_devices(*lengths: int) -> bool:
    """Whether devices divide sequences of these lengths among them."""
    return bool(divided("time", lengths))


def run_over_time(
    local: Callable, inputs: Sequence, axes: Sequence[Axes], segment_ids, state, outputs: Sequence[Axes]
) -> tuple[jax.Array, jax.Array]:
    """``local(state, segment_ids, *inputs)`` on each device's tokens; it returns y and the state behind all tokens."""
    return partitioned(local, (state, segment_ids, *inputs), (outputs[1], ROWS, *axes), outputs)


class Marks(NamedTuple):
    """Of one device's tokens of each row, [B]: ids of the first and last live one, whether there are any, and whether
    they are all of one document."""

    first: jax.Array
    last: jax.Array
    some: jax.Array
    alone: jax.Array


class Reach(NamedTuple):
    """Which of a device's tokens a state in front of them reaches, bool [B, T] (None: all), if it is of their document;
    and which are no padding."""

    reached: jax.Array | None
    live: jax.Array | None

    def only(self, value: jax.Array) -> jax.Array:
        """`value [B, T, ...]`, zero where no state reaches."""
        return value if self.reached is None else jnp.where(_spread(self.reached, value), value, 0)

    def decays(self, log_decay: jax.Array) -> jax.Array:
        """Sums of `log_decay [B, T, ...]` up to and including each token; float32, padding not counted."""
        log_decay = jnp.minimum(log_decay.astype(jnp.promote_types(log_decay.dtype, jnp.float32)), 0)
        if self.live is not None:
            log_decay = jnp.where(_spread(self.live, log_decay), log_decay, 0)
        return jnp.cumsum(log_decay, axis=1)


def reach(segment_ids) -> Reach:
    """Of a device's tokens, int [B, T] or None."""
    rows = documents(segment_ids)
    return Reach(None, None) if rows is None else Reach((rows.number == 0) & rows.live, rows.live)


def carried(segment_ids, behind: Any, transfer: Any, apply: Callable, initial: Any) -> tuple[Any, Any]:
    """The state in front of this device's tokens, for them to continue, and the one behind the tokens of all.

    Args:
        segment_ids: of this device's tokens, int [B, T], or None for one document in each row.
        behind: the state behind this device's tokens, begun from zero.
        transfer: what ``apply(transfer, state)`` needs to know of these tokens to make the state behind them of one in
            front of them, `behind` apart, where they are all of its document. Padding alone leaves it as it is.
        initial: the state in front of all tokens.
    """
    here = jax.lax.axis_index(AXIS)
    parts = jax.lax.all_gather((behind, transfer, _marks(segment_ids, initial)), AXIS)
    batch = initial.shape[0]
    number = jnp.arange(jax.lax.axis_size(AXIS), dtype=jnp.int32)

    def step(carry, part):
        state, entered, document, begun = carry
        index, (behind, transfer, marks) = part
        same = ~begun | (marks.first == document)
        entered = jnp.where(index == here, jnp.where(_spread(same, state), state, 0), entered)
        through = ~marks.some | (same & marks.alone)
        state = jnp.where(_spread(through, state), apply(transfer, state), 0) + behind
        return (state, entered, jnp.where(marks.some, marks.last, document), begun | marks.some), None

    start = initial, jnp.zeros_like(initial), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool)
    (last, entered, *_), _ = jax.lax.scan(step, start, (number, parts))
    return entered, last


def _marks(segment_ids, initial: jax.Array) -> Marks:
    batch = initial.shape[0]
    if segment_ids is None:
        return Marks(
            jnp.ones(batch, jnp.int32), jnp.ones(batch, jnp.int32), jnp.ones(batch, bool), jnp.ones(batch, bool)
        )
    rows, ids = documents(segment_ids), segment_ids.astype(jnp.int32)
    index = jnp.where(rows.live, jnp.arange(ids.shape[1]), -1)
    last, first = jnp.argmax(index, axis=1), jnp.argmax(rows.live, axis=1)
    ends = [jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0] for place in (first, last)]
    return Marks(*ends, jnp.any(rows.live, axis=1), jnp.max(rows.number, axis=1) == 0)


def _spread(flags: jax.Array, like: jax.Array) -> jax.Array:
    """`flags [B]` or `[B, T]` in a shape that broadcasts to `like [B, ...]`."""
    return flags.reshape(*flags.shape, *[1] * (like.ndim - flags.ndim))
