"""What a channel mixer is given and what it says of it, caught while its block runs."""

from typing import NamedTuple

import jax

from efficient_lm.models.auxiliary import Auxiliary
from efficient_lm.models.block import Block
from efficient_lm.models.context import Context


class Caught(NamedTuple):
    """One call of a channel mixer: what it read `[batch, time, width]`, what it was told, and what it observed."""

    x: jax.Array
    context: Context
    observed: dict[str, jax.Array]


class _Probe:
    """Stands in for a channel mixer and remembers what it was called with."""

    def __init__(self, inner: object):
        self.inner, self.calls = inner, []

    def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, Auxiliary]:
        y, auxiliary = self.inner(x, context)
        self.calls.append(Caught(x, context, auxiliary.observed))
        return y, auxiliary


def run_probed(block: Block, x: jax.Array, context: Context) -> tuple[jax.Array, Caught, dict[str, jax.Array]]:
    """The residual stream behind a block, what its channel mixer was called with, and what the block observed.

    Where a depth rule takes tokens away, the channel mixer's rows are shorter than the block's.
    """
    probe = _Probe(block.ffn.inner)
    block.ffn.inner = probe
    y, _, auxiliary = block(x, context)
    block.ffn.inner = probe.inner
    return y, probe.calls[0], auxiliary.observed
