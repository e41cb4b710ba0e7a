"""How long a program would take at least: the longest of computing, reading memory and talking, taken by itself.

Each term is an amount over a rate. Amounts are counted: FLOPs of matrix products as traced (recomputation included),
bytes that the compiled program reads and writes, bytes that devices send by algorithms that send as little as possible.
Rates are data sheets' times the efficiency that is stated, or of a CPU what it does at the time. What is left out:
anything but matrix products, kernels' start-up, waiting for the host, and whatever does not overlap.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efficient_lm.training.machines import Machine
from kernels_pallas.ahead import Compiled
from kernels_pallas.benchmark.ceilings import matmul_flops

EFFICIENCY = {"compute": 0.65, "memory": 0.8, "links": 0.8}
"""Parts of a data sheet's rate that are taken to be reached."""


class Term(NamedTuple):
    """One bound on a program's time.

    Attributes:
        name: "compute", "memory" or "links".
        amount: FLOPs or bytes of one device.
        rate: of them per second at most.
        efficiency: the part of the rate that is taken to be reached.
        basis: where the rate is from.
    """

    name: str
    amount: float
    rate: float
    efficiency: float
    basis: str

    @property
    def seconds(self) -> float:
        """Of the term alone."""
        return self.amount / (self.rate * self.efficiency)


class Estimate(NamedTuple):
    """The time of one call of a program.

    Attributes:
        model_flops: of one device, without what is recomputed.
        tokens: of all devices.
        peak_flops: per second of one device.
    """

    terms: tuple[Term, ...]
    model_flops: float
    tokens: int
    peak_flops: float

    @property
    def bound(self) -> Term:
        """The term that takes longest."""
        return max(self.terms, key=lambda term: term.seconds)

    def dump(self) -> dict[str, Any]:
        """As plain numbers."""
        seconds = self.bound.seconds
        return {
            "seconds": seconds,
            "bound_by": self.bound.name,
            "tokens_per_second": self.tokens / seconds,
            "mfu": self.model_flops / seconds / self.peak_flops,
            "terms": [term._asdict() | {"seconds": term.seconds} for term in self.terms],
        }


def estimate(program: Compiled, machine: Machine, dtype: str, model_flops: float, tokens: int) -> Estimate | None:
    """The time of a program; None where nothing is known of what the devices can do.

    Args:
        dtype: of its matrix products.
        model_flops: FLOPs of a call as the model counts them, on all devices; a program whose kernels declare none of
            theirs is taken to have at least these.
        tokens: that a call processes.
    """
    devices, most = len(machine.devices), machine.ceiling
    if most is not None:
        flops, bandwidth = matmul_flops(machine.target.kind, dtype), most.bytes
        bases = f"{dtype} peak of the data sheet", "main memory of the data sheet"
        efficiency = EFFICIENCY
    elif machine.target.platform == "cpu" and devices == 1:
        flops, bandwidth = measured(dtype)
        bases = f"{dtype} products measured now", "additions measured now"
        efficiency = dict.fromkeys(EFFICIENCY, 1.0)
    else:
        return None
    work = max(program.flops, model_flops) / devices
    terms = [
        Term("compute", work, flops, efficiency["compute"], bases[0]),
        Term("memory", program.traffic, bandwidth, efficiency["memory"], bases[1]),
        *_links(program, machine),
    ]
    return Estimate(tuple(terms), model_flops / devices, tokens, flops)


def _links(program: Compiled, machine: Machine) -> list[Term]:
    """One term for all collectives, which follow each other; its basis is that of those that take longest."""
    spent: dict[tuple[float, str], float] = defaultdict(float)
    for each in program.collectives if len(machine.devices) > 1 else ():
        rate = machine.bandwidth(each.group)
        if rate is not None:
            spent[rate] += each.moved
    if not any(spent.values()):
        return []
    seconds, amount = sum(moved / rate for (rate, _), moved in spent.items()), sum(spent.values())
    basis = max(spent, key=lambda rate: spent[rate] / rate[0])[1]
    return [Term("links", amount, amount / seconds, EFFICIENCY["links"], basis)]


@cache
def measured(dtype: str) -> tuple[float, float]:
    """FLOP/s of matrix products, and bytes/s of reading and writing main memory, of this process's CPU at the time."""
    size, long = 1024, 2**24
    products = _seconds(lambda x: x @ x / size, jnp.ones((size, size), dtype))
    return 2 * size**3 / products, 8 * long / _seconds(lambda x: x + 1, jnp.ones(long, jnp.float32))


def _seconds(function: Callable[[jax.Array], jax.Array], value: jax.Array, rounds: int = 5) -> float:
    """Of a call on what the call before has made, in its place: the fastest of some."""
    function, found = jax.jit(function, donate_argnums=0), []
    value = jax.block_until_ready(function(value))
    for _ in range(rounds):
        began = time.perf_counter()
        value = jax.block_until_ready(function(value))
        found.append(time.perf_counter() - began)
    return min(found)
