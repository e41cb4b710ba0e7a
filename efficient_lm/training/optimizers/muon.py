"""Momentum made orthogonal."""

from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from efficient_lm.models.parameters import Declaration, Parameters, map_declarations
from efficient_lm.spec import Count, Fraction, Positive
from efficient_lm.training.optimizers.base import OptimizerSpec
from efficient_lm.training.parameterization import Growth


class MuonSpec(OptimizerSpec):
    """Muon (Jordan et al. 2024; Liu et al. 2025, "Muon is Scalable for LLM Training"), with AdamW beside it.

    What a matrix is, the parameter declares; every layer, expert and head that is a matrix of its own is made
    orthogonal by itself. What is not a matrix, and matrices with a row or column for every token (embeddings, heads),
    are AdamW's.

    Attributes:
        momentum: decay rate of the average whose matrices are made orthogonal.
        nesterov: whether the gradient is mixed with it once more.
        iterations: Newton-Schulz steps.
        update_rms: root mean square of a step of any matrix, as a multiple of the learning rate; 0.2 is about AdamW's,
            so that both share one learning rate. None scales by ``max(1, outputs / inputs) ** 0.5`` instead, for
            learning rates around 0.02.
        adam_multiplier: of the learning rate, for what is AdamW's.
        beta1, beta2, epsilon: of AdamW; the last one is also added to the norm of a matrix.
    """

    kind: Literal["muon"] = "muon"
    learning_rate: Positive = 1e-3
    momentum: Fraction = 0.95
    nesterov: bool = True
    iterations: Count = 5
    update_rms: Positive | None = 0.2
    adam_multiplier: Positive = 1.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: Positive = 1e-8

    def direction(self, declarations: Parameters) -> optax.GradientTransformation:
        matrices = map_declarations(_is_hidden_matrix, declarations)
        others = jax.tree.map(lambda matrix: not matrix, matrices)
        axes = map_declarations(_dimensions, declarations)
        orthogonal = scale_by_muon(
            ns_steps=self.iterations,
            beta=self.momentum,
            eps=self.epsilon,
            nesterov=self.nesterov,
            weight_dimension_numbers=axes,
        )
        sizes = map_declarations(self._scale, declarations)
        sized = optax.stateless(lambda updates, params: jax.tree.map(_scaled, updates, sizes))
        adam = optax.scale_by_adam(self.beta1, self.beta2, self.epsilon)
        return optax.chain(
            optax.masked(optax.chain(orthogonal, sized), matrices),
            optax.masked(optax.chain(adam, optax.scale(self.adam_multiplier)), others),
        )

    def rate(self, growth: Growth) -> float:
        """Of a matrix made orthogonal, whose largest singular value is its scale (see `OptimizerSpec.rate`)."""
        if not _is_hidden_matrix(growth.declared):
            return super().rate(growth)
        grown = self._scale(growth.declared) / self._scale(growth.base)
        return (growth.outputs / growth.inputs) ** 0.5 / grown

    def _scale(self, declared: Declaration) -> Any:
        if not _is_hidden_matrix(declared):
            return optax.MaskedNode()
        inputs, outputs = (_product(declared, axes) for axes in declared.matrix)
        if self.update_rms is not None:
            return self.update_rms * max(inputs, outputs) ** 0.5
        return max(1.0, outputs / inputs) ** 0.5


def _is_hidden_matrix(declared: Declaration) -> bool:
    return declared.matrix is not None and "vocab" not in declared.axes


def _dimensions(declared: Declaration) -> Any:
    return MuonDimensionNumbers(*declared.matrix) if _is_hidden_matrix(declared) else optax.MaskedNode()


def _product(declared: Declaration, axes: tuple[int, ...]) -> int:
    product = 1
    for axis in axes:
        product *= declared.shape[axis]
    return product


def _scaled(update: jax.Array, factor: float) -> jax.Array:
    return update * factor
