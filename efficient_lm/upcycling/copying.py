"""Every expert a copy of the dense channel mixer."""

from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from efficient_lm.models.ffns.dense import DenseSpec
from efficient_lm.models.ffns.moe import MoESpec
from efficient_lm.models.parameters import Parameters
from efficient_lm.spec import Real
from efficient_lm.upcycling.base import ExpertsSpec
from efficient_lm.upcycling.statistics import Seen


class CopySpec(ExpertsSpec):
    """Sparse upcycling (Komatsuzaki et al. 2023, section 3): experts begin as copies, the router anew.

    With normalised weights and no noise the model computes what the dense one did, whatever the router says.

    Attributes:
        noise: standard deviation of what is added to each copy's parameters, as a share of theirs.
    """

    kind: Literal["copy"] = "copy"
    noise: Annotated[Real, Field(ge=0)] = 0.0

    def mixture(self, dense: DenseSpec, width: int) -> MoESpec:
        return MoESpec(experts=self.experts, top_k=self.top_k, expert=dense, router=self.router, balance=self.balance)

    def parts(
        self, dense: DenseSpec, width: int, params: Parameters, seen: Seen | None, key: jax.Array
    ) -> tuple[Sequence[Parameters], Parameters | None]:
        return [self._copy(params, jax.random.fold_in(key, number)) for number in range(self.experts)], None

    def _copy(self, params: Parameters, key: jax.Array) -> Parameters:
        if not self.noise:
            return params
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        noisy = [
            leaf + self.noise * jnp.std(leaf) * jax.random.normal(own, leaf.shape, leaf.dtype)
            for leaf, own in zip(leaves, keys, strict=True)
        ]
        return jax.tree.unflatten(tree, noisy)
