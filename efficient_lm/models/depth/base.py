"""The contract of a depth rule: it wraps a block, and decides which tokens the block runs for."""

from collections.abc import Callable, Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.models.auxiliary import Auxiliary
from efficient_lm.models.context import Context
from efficient_lm.models.mixers.base import Cache, MixerSpec
from efficient_lm.models.parameters import Initialization
from efficient_lm.spec import Choice

Run = Callable[[jax.Array, Context, Cache | None], tuple[jax.Array, Cache | None, Auxiliary]]
"""A block: ``run(x, context, cache)`` → the residual stream behind it, the cache with these tokens, auxiliaries."""


class DepthSpec(Choice, role="depth"):
    """A depth rule. One file per kind in this folder; defining the class registers it.

    Attributes:
        chooses: whether it chooses tokens of a row by comparing them, and can also decide for each token by itself.
        passes_by: whether tokens may pass by the block outside of training too.
    """

    chooses: ClassVar[bool] = False
    passes_by: ClassVar[bool] = True

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        """What cannot work in a model of this width: pairs of (key, message)."""
        return iter(())

    def mixer_faults(self, mixer: MixerSpec | None) -> Iterator[str]:
        """Why the rule cannot wrap a block with this mixer."""
        return iter(())

    def decided(self, selection: str) -> "DepthSpec":
        """The same, with tokens of rows without a cache chosen by ``top_k`` or ``causal``, if the rule `chooses`."""
        return self

    def resolved(self, width: int) -> "DepthSpec":
        """The same with every size that follows from the width filled in."""
        return self

    def build(self, width: int, init: Initialization) -> nnx.Module:
        """The module, called as ``rule(run, x, context, cache)`` with the result of `Run`.

        Its ``init_cache(empty, batch, length, dtype)`` makes the cache of rule and block; ``empty(batch, length,
        dtype)`` is the block's own.
        """
        raise TypeError(f"{type(self).__name__} does not define build")

    def flops_per_token(self, width: int, block: Callable[[float], float], context_length: float) -> float:
        """Forward FLOPs for one token of the sequence, the block's share included.

        `block(context_length)` is what the block costs for one token that runs it, among so many that do.
        """
        raise TypeError(f"{type(self).__name__} does not define flops_per_token")


def run_if_any(
    run: Run, x: jax.Array, context: Context, cache: Cache | None, anyone: jax.Array
) -> tuple[jax.Array, Cache | None, Auxiliary]:
    """`run`; of single tokens in front of a cache only if `anyone`, a bool scalar, and else nothing changes."""
    if cache is None or x.shape[1] > 1:
        return run(x, context, cache)

    def nothing(x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache, Auxiliary]:
        shapes = jax.eval_shape(run, x, context, cache)[2]
        return x, cache, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    return jax.lax.cond(anyone, lambda x, cache: run(x, context, cache), nothing, x, cache)
