"""The contract of a channel mixer.

``y, auxiliary = ffn(x, context)`` with `x [batch, time, width]`: each token by itself (see `Auxiliary`).
"""

from collections.abc import Iterator

import jax
from flax import nnx

from efficient_lm.models.elastic import Elastic
from efficient_lm.models.parameters import Initialization, Parameters
from efficient_lm.spec import Choice


class FFNSpec(Elastic, Choice, role="ffn"):
    """A channel mixer. One file per kind in this folder; defining the class registers it."""

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        """What cannot work in a model of this width: pairs of (key, message)."""
        return iter(())

    def decode_faults(self) -> Iterator[tuple[str, str]]:
        """What keeps a model that has it from generating token by token: pairs of (key, message)."""
        return iter(())

    def resolved(self, width: int) -> "FFNSpec":
        """The same with every size that follows from the width filled in."""
        return self

    @property
    def pregated_experts(self) -> int | None:
        """Experts that a router in front of the layers has to score for it; None where it asks for no scores."""
        return None

    def build(self, width: int, init: Initialization) -> nnx.Module:
        """The module, called as ``ffn(x, context)``."""
        raise TypeError(f"{type(self).__name__} does not define build")

    def corrected(self, params: Parameters, counts: dict[str, jax.Array]) -> Parameters:
        """The parameters after an optimizer step, moved by what its tokens were counted to do.

        Arrays have a leading axis `layers`; `counts` are the arrays among what the layers observed, summed over the
        step's micro-batches.
        """
        return params

    def flops_per_token(self, width: int) -> float:
        """Forward FLOPs for one token; the backward pass costs twice as much."""
        raise TypeError(f"{type(self).__name__} does not define flops_per_token")
