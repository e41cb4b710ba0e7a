"""Tokens and experts divided over devices: tokens travel to experts and back by all-to-all, and none is dropped.

Where only tokens are divided, each device runs all experts on its own. The mesh axis ``expert`` divides the experts
and, together with the other axes of the batch, the tokens. Each device sorts its tokens by expert, sends each to the
device that holds the expert, runs the experts it holds on what arrives, and sends the results back (Lepikhin et al.
2020, "GShard", section 3.2). Every buffer is as large as the worst case, in which all tokens of the axis meet on one
device: shapes are static, and no capacity drops anything.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from efficient_lm.models.ffns.experts.dispatch import dropless
from efficient_lm.models.parameters import Parameters
from kernels_pallas import partition
from kernels_pallas.partition import MESH_AXES, manual

AXIS = "expert"
"""The mesh axis that divides the experts."""

BATCH_AXES = MESH_AXES["batch"]
"""Mesh axes that divide the batch."""

Exchange = Literal["auto", "dense", "ragged"]
"""How rows travel: ``dense`` pads what goes to each device to the worst case, ``ragged`` sends rows alone, which XLA
has for TPUs and GPUs; ``auto`` takes ``ragged`` where there is one of these."""

Compute = Callable[[Parameters, jax.Array, jax.Array], jax.Array]
"""``compute(params, rows [rows, width], sizes [experts])``: rows sorted by expert through their experts."""


def divided(batch: int, time: int) -> bool:
    """Whether the ambient mesh divides these tokens; each device then routes those that it holds."""
    return any(_tokens(batch, time)) and (AXIS not in jax.sharding.get_abstract_mesh().shape or bool(_tokens(batch)[0]))


def by_rows(function: Callable[[jax.Array], jax.Array], values: jax.Array) -> jax.Array:
    """``function(values)``, which treats each row ``[batch, ...]`` by itself, for each device's rows on that device.

    The compiler would have every device sort the rows of all.
    """
    return _by(function, values, P(*_tokens(len(values))))


def by_tokens(function: Callable[[jax.Array], jax.Array], values: jax.Array) -> jax.Array:
    """The same of a function that treats each token of ``[batch, time, ...]`` by itself."""
    return _by(function, values, P(*_tokens(*values.shape[:2])))


def _by(function: Callable[[jax.Array], jax.Array], values: jax.Array, places: P) -> jax.Array:
    return manual(function, places, places)(values) if any(places) else function(values)


def _tokens(batch: int, time: int | None = None) -> list[tuple[str, ...] | None]:
    """The mesh axes that divide rows, and those that divide the tokens of a row."""
    sizes = {"batch": batch} if time is None else {"batch": batch, "time": time}
    return [partition.divided(kind, [size]) or None for kind, size in sizes.items()]


def routed(
    compute: Compute, params: Parameters, x: jax.Array, routes: jax.Array, count: int, exchange: Exchange = "auto"
) -> jax.Array:
    """Every token through each of its experts, wherever that is.

    Args:
        compute: the experts that one device holds.
        params: of all experts; every leaf has a leading axis of `count` experts.
        x: ``[batch, time, width]``.
        routes: int32 ``[batch, time, k]``, an expert each, or -1 for none.
        count: experts there are, divided by the mesh axis ``expert``; without one every device has them all.

    Returns:
        ``[batch, time, k, width]``, zeros where there is no route.
    """
    rows, ways = P(*_tokens(*x.shape[:2])), jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)
    if exchange == "auto":
        exchange = "dense" if jax.default_backend() == "cpu" else "ragged"
    local = partial(_exchanged, compute, count=count, ways=ways, exchange=exchange)
    local = partial(_alone, compute, count=count) if ways == 1 else local
    # The loops inside experts begin with zeros that are the same everywhere, which the check would refuse.
    over = manual(local, (P(AXIS if ways > 1 else None), rows, rows), rows)
    return over(params, x, routes)


def _alone(compute: Compute, params: Parameters, x: jax.Array, routes: jax.Array, *, count: int) -> jax.Array:
    """One device's part of `routed` where it has all experts."""
    plan = dropless(routes, count)
    done = plan(lambda rows, groups: compute(params, rows, groups.sizes), x.reshape(-1, x.shape[-1]))
    return done.reshape(*routes.shape, -1)


def _exchanged(
    compute: Compute, params: Parameters, x: jax.Array, routes: jax.Array, *, count: int, ways: int, exchange: str
) -> jax.Array:
    """One device's part of `routed` where it has its share of them."""
    held, width, top_k = count // ways, x.shape[-1], routes.shape[-1]
    chosen = jnp.where(routes < 0, count, routes).reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    tokens = x.reshape(-1, width)[order // top_k]
    sizes = jnp.bincount(chosen, length=count + 1)[:count].reshape(ways, held)
    travel = _Dense(sizes, len(chosen)) if exchange == "dense" else _Ragged(sizes, len(chosen))
    arrived = travel.there(tokens)
    experts = travel.there((chosen[order] % held)[:, None], empty=held)[:, 0]
    by_expert = jnp.argsort(experts, stable=True)
    done = compute(params, arrived[by_expert], jnp.bincount(experts, length=held + 1)[:held])
    back = travel.back(jnp.zeros_like(arrived).at[by_expert].set(done))
    return jnp.zeros_like(back).at[order].set(back).reshape(*routes.shape, width)


class _Dense:
    """Rows sorted by destination, in a buffer of the worst case for each."""

    def __init__(self, sizes: jax.Array, rows: int):
        self.ways, self.rows = len(sizes), rows
        ends = jnp.cumsum(sizes.sum(1))
        index = jnp.arange(rows)
        self.destination = jnp.searchsorted(ends, index, side="right")  # `ways` for rows that go nowhere
        self.place = index - jnp.where(self.destination > 0, ends[self.destination - 1], 0)

    def there(self, values: jax.Array, empty: int = 0) -> jax.Array:
        """``[rows, n]`` → ``[ways * rows, n]``, what all devices sent here."""
        buffer = jnp.full((self.ways, self.rows, values.shape[1]), empty, values.dtype)
        buffer = buffer.at[self.destination, self.place].set(values, mode="drop")
        return jax.lax.all_to_all(buffer, AXIS, 0, 0).reshape(-1, values.shape[1])

    def back(self, values: jax.Array) -> jax.Array:
        """``[ways * rows, n]`` → ``[rows, n]``, each row where it came from."""
        buffer = jax.lax.all_to_all(values.reshape(self.ways, self.rows, -1), AXIS, 0, 0)
        return buffer.at[self.destination, self.place].get(mode="fill", fill_value=0)


class _Ragged:
    """Rows sorted by destination, sent without padding."""

    def __init__(self, sizes: jax.Array, rows: int):
        self.ways, self.rows = len(sizes), rows
        self.sent = sizes.sum(1).astype(jnp.int32)
        between = jax.lax.all_gather(self.sent, AXIS)  # [from, to]
        here = jax.lax.axis_index(AXIS)
        before_from = jnp.cumsum(between, axis=0) - between
        before_to = jnp.cumsum(between, axis=1) - between
        self.received = between[:, here]
        self.starts, self.arrival_starts = before_to[here], before_from[:, here]
        self.places_there, self.places_back = before_from[here], before_to[:, here]

    def there(self, values: jax.Array, empty: int = 0) -> jax.Array:
        """``[rows, n]`` → ``[ways * rows, n]``, what all devices sent here."""
        buffer = jnp.full((self.ways * self.rows, values.shape[1]), empty, values.dtype)
        return jax.lax.ragged_all_to_all(
            values, buffer, self.starts, self.sent, self.places_there, self.received, axis_name=AXIS
        )

    def back(self, values: jax.Array) -> jax.Array:
        """``[ways * rows, n]`` → ``[rows, n]``, each row where it came from."""
        buffer = jnp.zeros((self.rows, values.shape[1]), values.dtype)
        return jax.lax.ragged_all_to_all(
            values, buffer, self.arrival_starts, self.received, self.places_back, self.sent, axis_name=AXIS
        )
