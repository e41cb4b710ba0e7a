"""Time on the device: by NVIDIA's profiling interface where it is there, else of many calls in a row."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

ENOUGH = 0.05
"""Seconds that the calls of one measurement take together, so that starting them does not count."""


class Times(NamedTuple):
    """Milliseconds of one call: median, and the quarter and three quarter points of its measurements."""

    median: float
    low: float
    high: float


def measured(run: Callable[[], object], rounds: int) -> Times:
    """Time `run`, which starts one call and returns its arrays; it is warm afterwards."""
    jax.block_until_ready(run())
    calls, start = 1, time.perf_counter()
    jax.block_until_ready(run())
    calls = max(1, min(100, int(ENOUGH / max(time.perf_counter() - start, 1e-6))))
    return summary([_once(run, calls) for _ in range(rounds)])


def summary(milliseconds: list[float]) -> Times:
    """The spread of several measurements."""
    if len(milliseconds) == 1:
        return Times(*milliseconds * 3)
    low, median, high = statistics.quantiles(milliseconds, n=4)
    return Times(median, low, high)


def _once(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        out = run()
    jax.block_until_ready(out)
    return 1e3 * (time.perf_counter() - start) / calls


def kernel_milliseconds(function: Callable, arguments: tuple) -> float | None:
    """The time of the kernels of one call, without what lies between them; None where the GPU cannot tell."""
    if jax.default_backend() != "gpu":
        return None
    from jax.experimental.mosaic.gpu import profiler

    try:
        _, milliseconds = profiler.measure(function)(*arguments)
    except RuntimeError:
        return None
    return milliseconds
