"""Next-token prediction."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from efficient_lm.models.auxiliary import Auxiliary, counts, means
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters
from efficient_lm.objectives.base import Batch, ObjectiveSpec, Sums, context_of
from efficient_lm.objectives.distillation import Teacher, distillation
from efficient_lm.objectives.exit_losses import exit_losses
from efficient_lm.spec import Count, Real
from kernels_pallas.linear_cross_entropy import CrossEntropySums, linear_cross_entropy

DRAWN_TOGETHER = 4096
"""Tokens, about, for which predictions exist at one time when targets are drawn from them."""


class CausalLMSpec(ObjectiveSpec):
    """Cross entropy of the next token.

    Attributes:
        z_loss: coefficient of the squared log-normaliser (PaLM, Chowdhery et al. 2022, section 5), 1e-4 where used.
        chunk: tokens whose logits exist at one time; None materialises all of them or not by a measured rule (see
            `kernels_pallas.linear_cross_entropy`).
    """

    kind: Literal["causal_lm"] = "causal_lm"
    z_loss: Real = 0.0
    chunk: Count | None = None

    def sums(
        self,
        model: LanguageModel,
        params: Parameters,
        batch: Batch,
        dtype: jax.typing.DTypeLike,
        packed: bool = True,
        key: jax.Array | None = None,
        teacher: Teacher | None = None,
    ) -> Sums:
        context, weights = context_of(batch, packed, key), batch["weights"]

        def read(hidden: jax.Array, weights: jax.Array) -> CrossEntropySums:
            return linear_cross_entropy(
                hidden,
                model.head_weight(params),
                batch["targets"],
                weights,
                z_loss=self.z_loss,
                softcap=model.spec.logit_softcap,
                chunk=self.chunk,
            )

        if model.exits is None:
            hidden, _, auxiliary = model.hidden(params, batch["tokens"], context, dtype=dtype)
        else:
            hidden, streams, auxiliary = model.hidden_with_exits(params, batch["tokens"], context, dtype)
        if teacher is not None:
            learned = distillation(hidden, model.head_weight(params), model.spec.logit_softcap, teacher, batch)
            metrics = {"cross_entropy": learned.cross_entropy, "accuracy": learned.correct}
            return _finished(learned.divergence, metrics | {"divergence": learned.divergence}, auxiliary, weights)
        sums = read(hidden, weights)
        metrics = {"cross_entropy": sums.loss_sum, "accuracy": sums.correct_sum}
        loss = self._total(sums)
        if self.z_loss:
            metrics["z_loss"] = self.z_loss * sums.z_loss_sum
        if model.exits is not None:
            loss, more = exit_losses(model, params, hidden, streams, weights, read, self._total, sums)
            metrics |= more
        return _finished(loss, metrics, auxiliary, weights)

    def drawn(
        self,
        model: LanguageModel,
        params: Parameters,
        batch: Batch,
        dtype: jax.typing.DTypeLike,
        packed: bool,
        key: jax.Array,
    ) -> Batch:
        hidden = model.hidden(params, batch["tokens"], context_of(batch, packed), dtype=dtype)[0]
        rows, time, width = hidden.shape
        pieces = math.gcd(time, -(-rows * time // DRAWN_TOGETHER))

        def draw(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
            return jax.random.categorical(piece[1], model.logits_from(params, piece[0]))

        # Pieces along time, so that rows stay on their devices.
        cut = jnp.moveaxis(hidden.reshape(rows, pieces, time // pieces, width), 1, 0)
        found = jax.lax.map(draw, (cut, jax.random.split(key, pieces)))
        targets = jnp.moveaxis(found, 0, 1).reshape(rows, time).astype(batch["targets"].dtype)
        return batch | {"targets": targets}

    def _total(self, sums: CrossEntropySums) -> jax.Array:
        """What is minimised at one head."""
        return sums.loss_sum + self.z_loss * sums.z_loss_sum if self.z_loss else sums.loss_sum


def _finished(loss: jax.Array, metrics: dict[str, jax.Array], auxiliary: Auxiliary, weights: jax.Array) -> Sums:
    """With what layers add to the loss and observed."""
    weight = jnp.sum(weights)
    seen = auxiliary.losses | means(auxiliary.observed)
    metrics = metrics | {name: value * weight for name, value in seen.items()}
    return Sums(loss + sum(auxiliary.losses.values()) * weight, weight, metrics, counts(auxiliary.observed))
