"""Learned augmented residual layer: a path of low rank beside a mixer."""

import math
from typing import Literal

import jax
from flax import nnx

from efficient_lm.models.layers.linear import LowRank, scaled
from efficient_lm.models.layers.norms import NormSpec
from efficient_lm.models.parameters import Initialization
from efficient_lm.spec import Count, Spec


class LaurelSpec(Spec):
    """LAuReL of low rank (Menghani et al. 2024, arXiv 2411.07501, section 2).

    Attributes:
        rank: of the path ``A B``.
        form: ``added``: ``x + f(x) + A B x``, as published; ``averaged``: ``(x + f(n) + n + norm(A B n)) / sqrt(2)``
            with n what the mixer reads, ``norm(x)``, and a norm like the block's (Gemma 3n).
    """

    rank: Count = 64
    form: Literal["added", "averaged"] = "added"

    def build(self, width: int, norm: NormSpec, init: Initialization) -> "Laurel":
        """The module; `norm` is the block's."""
        return Laurel(self, width, norm, init)

    def flops_per_token(self, width: int) -> float:
        """Forward FLOPs for one token."""
        return 2.0 * 2 * width * self.rank


class Laurel(nnx.Module):
    def __init__(self, spec: LaurelSpec, width: int, norm: NormSpec, init: Initialization):
        self.path = LowRank(width, spec.rank, {"embed": width}, init=init)
        self.norm = norm.build(width) if spec.form == "averaged" else None

    def __call__(self, mixed: jax.Array, x: jax.Array, read: jax.Array) -> jax.Array:
        """The stream `mixed [batch, time, width]` behind a mixer, which read `read` of the stream `x`, augmented."""
        if self.norm is None:
            return mixed + self.path(x)
        return scaled(mixed + read + self.norm(self.path(read)), math.sqrt(0.5))
