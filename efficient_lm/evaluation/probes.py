"""What parts of a block are given, and what a channel mixer says of it, caught while the block runs."""

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
from flax import nnx

from efficient_lm.models.auxiliary import Auxiliary
from efficient_lm.models.block import Block
from efficient_lm.models.context import Context


class Caught(NamedTuple):
    """One call of a channel mixer: what it read `[batch, time, width]`, what it was told, and what it observed."""

    x: jax.Array
    context: Context
    observed: dict[str, jax.Array]


class _Probe:
    """Stands in for a module and remembers what it was called with and what it gave."""

    def __init__(self, inner: Any):
        self.inner, self.calls = inner, []

    def __call__(self, *given: Any) -> Any:
        result = self.inner(*given)
        self.calls.append((given, result))
        return result


def run_probed(block: Block, x: jax.Array, context: Context) -> tuple[jax.Array, Caught, dict[str, jax.Array]]:
    """The residual stream behind a block, what its channel mixer was called with, and what the block observed.

    Where a depth rule takes tokens away, the channel mixer's rows are shorter than the block's.
    """
    y, auxiliary, (calls,) = _run(block, [("ffn", "inner")], x, context)
    (read, told), (_, said) = calls[0]
    return y, Caught(read, told, said.observed), auxiliary.observed


def run_listening(
    block: Block, paths: Sequence[tuple[str, ...]], x: jax.Array, context: Context
) -> tuple[jax.Array, list[list[tuple[Any, ...]]]]:
    """The residual stream behind a block, and of each module inside at `paths` the arguments of its calls."""
    y, _, found = _run(block, paths, x, context)
    return y, [[given for given, _ in calls] for calls in found]


def _run(
    block: Block, paths: Sequence[tuple[str, ...]], x: jax.Array, context: Context
) -> tuple[jax.Array, Auxiliary, list[list[tuple[Any, Any]]]]:
    places: list[tuple[nnx.Module, str, _Probe]] = []
    for path in paths:
        parent = reduce(getattr, path[:-1], block)
        places.append((parent, path[-1], _Probe(getattr(parent, path[-1]))))
    for parent, name, probe in places:
        setattr(parent, name, probe)
    y, _, auxiliary = block(x, context)
    for parent, name, probe in places:
        setattr(parent, name, probe.inner)
    return y, auxiliary, [probe.calls for _, _, probe in places]
