"""How tokens reach their experts and come back.

Rows sorted by expert are the tokens of `routes`, each as often as it has experts. Without a bound (dropless) experts
have as many rows as they are asked for, and memory does not grow with the number of experts. Within a capacity every
expert has the same number of rows, some of them empty.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from efficient_lm.models.layers.groups import Groups
from efficient_lm.spec import Positive, Spec

Over = Literal["sequence", "batch"]
"""Tokens that compete for a capacity: those of a row, or of all rows."""

Compute = Callable[[jax.Array, Groups], jax.Array]
"""``compute(rows [rows, width], groups)``: rows sorted by expert through their experts."""


class DispatchSpec(Spec):
    """How many tokens an expert takes.

    Attributes:
        capacity_factor: an expert takes at most ``ceil(capacity_factor * top_k * tokens / experts)`` tokens, padding
            counted among these tokens (Fedus et al. 2021, Switch, eq. 3; Lepikhin et al. 2020, GShard, section 2.2);
            null: as many as choose it. Where more choose it, all tokens' first choices go before all second ones, and
            among choices of one rank earlier positions before later ones, of one position earlier rows: the others are
            dropped, and add nothing.
        over: the tokens counted, and competing: of each row (``sequence``) or of all (``batch``).
    """

    capacity_factor: Positive | None = None
    over: Over = "sequence"


def capacity(factor: float, top_k: int, tokens: int, share: float) -> int:
    """Rows of an expert that is to take `share` of all routes of `tokens` tokens; never more than tokens."""
    return min(tokens, math.ceil(round(factor * top_k * tokens * share, 6)))


@dataclass(frozen=True)
class Plan:
    """Which row goes where.

    Attributes:
        routes: int32 ``[rows]``, the route (``token * k + choice``) of each row; tokens * k for an empty row.
        places: int32 ``[tokens, k]``, the row of each route; `rows` for one that has none.
        groups: of the rows, by expert.
    """

    routes: jax.Array
    places: jax.Array
    groups: Groups

    def __call__(self, compute: Compute, x: jax.Array) -> jax.Array:
        """`x [tokens, width]` through each token's experts → ``[tokens, k, width]``, 0 where a route has no row."""
        top_k = self.places.shape[1]
        rows = compute(exchanged(x, self.routes // top_k, self.places), self.groups)
        return exchanged(rows, self.places.reshape(-1), self.routes[:, None]).reshape(*self.places.shape, -1)


@jax.custom_vjp
def exchanged(values: jax.Array, sources: jax.Array, targets: jax.Array) -> jax.Array:
    """`values [n, width]` of the rows `sources [m]`, 0 for a source n or above.

    `targets [n, copies]` says the inverse: where each row went, m or above for nowhere. Knowing it, the gradient
    gathers too, which is faster than scattering.
    """
    return values.at[sources].get(mode="fill", fill_value=0)


def _forward(values: jax.Array, sources: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    return exchanged(values, sources, targets), targets


def _backward(targets: jax.Array, pull: jax.Array) -> tuple[jax.Array, None, None]:
    gathered = pull.at[targets].get(mode="fill", fill_value=0)
    return jnp.sum(gathered.astype(jnp.float32), axis=1).astype(pull.dtype), None, None


exchanged.defvjp(_forward, _backward)


def dropless(routes: jax.Array, experts: int) -> Plan:
    """The plan in which no token is dropped, for `routes [batch, time, k]`; routes outside the experts go nowhere."""
    flat = jnp.where((routes < 0) | (routes >= experts), experts, routes).reshape(-1)
    order = jnp.argsort(flat, stable=True)
    ends = jnp.searchsorted(flat[order], jnp.arange(experts), side="right").astype(jnp.int32)
    sizes = jnp.diff(ends, prepend=0)
    places = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
    return Plan(order, places.reshape(-1, routes.shape[-1]), Groups(sizes))


def waiting(routes: jax.Array, experts: int, over: Over) -> jax.Array:
    """How many routes go before each to its expert, int32 ``[batch, time, k]``, in the order of `DispatchSpec`."""
    axes = (0, 2, 1) if over == "sequence" else (2, 1, 0)
    turned = jnp.where((routes < 0) | (routes >= experts), experts, routes).transpose(axes)
    if over == "sequence":
        turned = turned + (experts + 1) * jnp.arange(len(turned))[:, None, None]
    order = jnp.argsort(turned.reshape(-1), stable=True)
    queues = turned.reshape(-1)[order]
    ahead = jnp.arange(len(order)) - jnp.searchsorted(queues, queues, side="left")
    ahead = jnp.zeros_like(ahead).at[order].set(ahead, unique_indices=True)
    return ahead.reshape(turned.shape).transpose(axes)


def bounded(routes: jax.Array, ahead: jax.Array, experts: int, places: int, over: Over) -> Plan:
    """The plan in which an expert has `places` rows for each row of the batch, or for all: its routes fill the first.

    `ahead` is what `waiting` says of the routes; those with as many ahead as there are places get none.
    """
    batch = len(routes) if over == "sequence" else 1
    rows, count = experts * batch * places, routes.size
    queue = routes * batch + (jnp.arange(batch)[:, None, None] if over == "sequence" else 0)
    kept = (routes >= 0) & (routes < experts) & (ahead < places)
    taken = jnp.where(kept, queue * places + ahead, rows)
    filled = jnp.full(rows, count).at[taken.reshape(-1)].set(jnp.arange(count), mode="drop")
    return Plan(filled, taken.reshape(-1, routes.shape[-1]), Groups())
