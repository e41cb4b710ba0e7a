"""Several mixers side by side on the same input, summed."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import jax
from flax import nnx

from efficient_lm.models.context import Context
from efficient_lm.models.elastic import Elastic
from efficient_lm.models.layers.linear import scaled
from efficient_lm.models.mixers.attention import AttentionSpec
from efficient_lm.models.mixers.base import Cache, MixerSpec
from efficient_lm.models.mixers.mamba2 import Mamba2Spec
from efficient_lm.models.parameters import Initialization
from efficient_lm.spec import OneOf, Positive, Spec


class BranchSpec(Spec):
    """A mixer beside others: ``output_multiplier * mixer(input_multiplier * x)``, with constant factors."""

    mixer: OneOf[MixerSpec]
    input_multiplier: Positive = 1.0
    output_multiplier: Positive = 1.0


class ParallelSpec(MixerSpec):
    """``Σ_i o_i mixer_i(m_i x)``: two or three mixers on the same normed input, each with its own output map.

    Falcon-H1 (2025, arXiv 2507.22448, section 2) has a Mamba-2 and an attention in every layer so, with heads for each
    chosen apart. For more than three, a branch may itself be parallel.

    Attributes:
        first, second, third: the branches; `third` may be missing.
    """

    kind: Literal["parallel"] = "parallel"
    first: BranchSpec = BranchSpec(mixer=Mamba2Spec())
    second: BranchSpec = BranchSpec(mixer=AttentionSpec())
    third: BranchSpec | None = None

    @property
    def branches(self) -> dict[str, BranchSpec]:
        """Those that there are, by name."""
        named = {"first": self.first, "second": self.second, "third": self.third}
        return {name: branch for name, branch in named.items() if branch is not None}

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        for name, branch in self.branches.items():
            if branch.mixer.bidirectional:
                yield f"{name}.mixer.kind", f"'{branch.mixer.kind}' sees later tokens, and a branch must not"
            if branch.mixer.takes_keys:
                yield f"{name}.mixer.shares_keys", "a branch has keys and values of its own; false is the only value"
            yield from ((f"{name}.mixer.{key}", message) for key, message in branch.mixer.faults(width))

    def resolved(self, width: int) -> "ParallelSpec":
        return self.model_copy(
            update={
                name: branch.model_copy(update={"mixer": branch.mixer.resolved(width)})
                for name, branch in self.branches.items()
            }
        )

    def axis_sizes(self) -> dict[str, int]:
        """By axis what all branches that have it can be cut by: of their numbers the greatest common divisor."""
        found: dict[str, set[int]] = {}
        for branch in self.branches.values():
            for axis, count in branch.mixer.axis_sizes().items():
                found.setdefault(axis, set()).add(count)
        return {axis: math.gcd(*counts) for axis, counts in found.items()}

    def inside(self) -> dict[str, Elastic]:
        return {name: branch.mixer for name, branch in self.branches.items()}

    def cut(self, units: Mapping[str, int]) -> "ParallelSpec":
        """Every branch by the same part."""
        changes, mine = {}, self.axis_sizes()
        for name, branch in self.branches.items():
            counts = branch.mixer.axis_sizes()
            theirs = {axis: units[axis] * counts[axis] // mine[axis] for axis in counts if axis in units}
            changes[name] = branch.model_copy(update={"mixer": branch.mixer.cut(theirs)})
        return self.model_copy(update=changes)

    def held_to(self, base: "ParallelSpec", width: int, base_width: int) -> "ParallelSpec":
        changes = {}
        for name, branch in self.branches.items():
            held = branch.mixer.held_to(base.branches[name].mixer, width, base_width)
            changes[name] = branch.model_copy(update={"mixer": held})
        return self.model_copy(update=changes)

    def build(self, width: int, init: Initialization) -> nnx.Module:
        return Parallel(self, width, init)

    def flops_per_token(self, width: int, context_length: int) -> float:
        """Those of the branches together."""
        return sum(branch.mixer.flops_per_token(width, context_length) for branch in self.branches.values())


class Parallel(nnx.Module):
    def __init__(self, spec: ParallelSpec, width: int, init: Initialization):
        self.spec = spec
        for name, branch in spec.branches.items():
            setattr(self, name, branch.mixer.build(width, init))

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """`x [batch, time, width]` → the same shape and dtype, and the cache with these tokens added."""
        total, new = None, {}
        for name, branch in self.spec.branches.items():
            own = None if cache is None else _below(cache, name)
            y, own = getattr(self, name)(scaled(x, branch.input_multiplier), context, own)
            y = scaled(y, branch.output_multiplier)
            total = y if total is None else total + y
            new |= _named(own or {}, name)
        return total, None if cache is None else new

    def __getattr__(self, name: str) -> Callable:
        """`log_decay`, `entropy`, `weights`: those of the first branch that has them; without one there is none."""
        if name in ("log_decay", "entropy", "weights"):
            for place, branch in self.spec.branches.items():
                if hasattr(getattr(self, place), name):
                    measure, factor = getattr(getattr(self, place), name), branch.input_multiplier
                    return lambda x, context: measure(scaled(x, factor), context)
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def init_cache(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
        """The branches' caches in one, ``first.state`` and so on."""
        cache: Cache = {}
        for name in self.spec.branches:
            cache |= _named(getattr(self, name).init_cache(batch, length, dtype), name)
        return cache


def _named(cache: Cache, name: str) -> Cache:
    return {f"{name}.{leaf}": value for leaf, value in cache.items()}


def _below(cache: Cache, name: str) -> Cache:
    prefix = f"{name}."
    return {leaf.removeprefix(prefix): value for leaf, value in cache.items() if leaf.startswith(prefix)}
