"""Next-token prediction."""

from typing import Literal

import jax

from efficient_lm.models.auxiliary import counts, means
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters
from efficient_lm.objectives.base import Batch, ObjectiveSpec, Sums, context_of
from efficient_lm.spec import Count, Real
from kernels_pallas.linear_cross_entropy import linear_cross_entropy


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
    ) -> Sums:
        hidden, _, auxiliary = model.hidden(params, batch["tokens"], context_of(batch, packed, key), dtype=dtype)
        sums = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            model.head_weight(params),
            batch["targets"].reshape(-1),
            batch["weights"].reshape(-1),
            z_loss=self.z_loss,
            softcap=model.spec.logit_softcap,
            chunk=self.chunk,
        )
        metrics = {"cross_entropy": sums.loss_sum, "accuracy": sums.correct_sum}
        loss = sums.loss_sum
        if self.z_loss:
            loss = loss + self.z_loss * sums.z_loss_sum
            metrics["z_loss"] = self.z_loss * sums.z_loss_sum
        loss = loss + sum(auxiliary.losses.values()) * sums.weight_sum
        seen = auxiliary.losses | means(auxiliary.observed)
        metrics |= {name: value * sums.weight_sum for name, value in seen.items()}
        return Sums(loss, sums.weight_sum, metrics, counts(auxiliary.observed))
