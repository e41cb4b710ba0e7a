"""The contract of an objective: sums and counts, never means.

The one division happens in the training step, after accumulation over micro-batches and across devices, so that a mean
over tokens is the same however a batch is cut.
"""

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax

from efficient_lm.models.context import Context
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters
from efficient_lm.spec import Choice

if TYPE_CHECKING:
    from efficient_lm.objectives.distillation import Teacher

Batch = dict[str, jax.Array]
"""`tokens`, `targets`, `segment_ids`, `positions` int32 and `weights` float32, each ``[batch, time]``."""


class Sums(NamedTuple):
    """What an objective returns; all float32 scalars.

    Attributes:
        loss: what is differentiated, summed over weighted tokens.
        weight: what `loss` and every metric are divided by in the end.
        metrics: other sums, by name; `cross_entropy` is always among them.
        counts: what layers counted, by layer (see `efficient_lm.models.auxiliary.counts`).
    """

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]
    counts: dict[str, Any] = {}  # noqa: RUF012  (never written to)


class ObjectiveSpec(Choice, role="objective"):
    """A training objective.

    Attributes:
        causal: whether it predicts later tokens from earlier ones, which a bidirectional mixer would see.
    """

    causal: ClassVar[bool] = True

    def sums(
        self,
        model: LanguageModel,
        params: Parameters,
        batch: Batch,
        dtype: jax.typing.DTypeLike,
        packed: bool = True,
        key: jax.Array | None = None,
        teacher: "Teacher | None" = None,
    ) -> Sums:
        """Loss and counts of one (micro-)batch, computed in `dtype`; `packed` False promises whole-row documents.

        `key` is of the random numbers of training; None has none. With a `teacher` the model learns what that says of
        the batch in place of what the batch says.
        """
        raise TypeError(f"{type(self).__name__} does not define sums")

    def drawn(
        self,
        model: LanguageModel,
        params: Parameters,
        batch: Batch,
        dtype: jax.typing.DTypeLike,
        packed: bool,
        key: jax.Array,
    ) -> Batch:
        """The batch with targets drawn from the model's own predictions, as estimates of the curvature want them."""
        raise TypeError(f"{type(self).__name__} does not define drawn")


def context_of(batch: Batch, packed: bool = True, key: jax.Array | None = None) -> Context:
    """The positions and documents of a batch, for a pass without cache."""
    return Context(batch["positions"], batch["segment_ids"], "train", packed, key=key)
