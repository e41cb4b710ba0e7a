"""How starts, learning rates and constant factors follow from the width, so that what is tuned narrow holds when wide.

Maximal update parametrization (Yang et al. 2022, arXiv 2203.03466, "Tensor Programs V"), in the form of its table 8 for
the head, which may then be the embedding, and of its table 3 for all else. A parameter sums over its inputs; which
these are it declares. With the ratios i and o of its numbers of inputs and outputs to those of the same model at
`base_width`, its start has i^-1/2 min(1, (o/i)^1/2) times the standard deviation it has there: the "spectral
condition" of Yang, Simon and Bernstein 2023 (arXiv 2310.17813), which is the table's column where each ratio is either
one or the width's.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax

from efficient_lm.errors import ConfigError
from efficient_lm.models.language_model import LanguageModel, ModelSpec
from efficient_lm.models.parameters import Declaration, Normal, Parameters, Uniform, is_declaration, parameter_table
from efficient_lm.models.widths import held_to
from efficient_lm.spec import Choice, Count, merged
from efficient_lm.validation import validate

_OTHER_PARTS = "parameterization.base: makes a model of other parts; change sizes alone"


@dataclass(frozen=True)
class Growth:
    """How much larger a parameter is than the same one at the base width."""

    declared: Declaration
    base: Declaration

    @property
    def inputs(self) -> float:
        """Ratio of the numbers of values that each output sums over.

        One for a head: its sum is divided in the factor of the logits, so that its weights may be the embedding's.
        """
        return 1.0 if self._is_head else self._ratio(self.declared.inputs)

    @property
    def outputs(self) -> float:
        """Ratio of the numbers of outputs; of a head, of its inputs."""
        return self._ratio(self.declared.inputs if self._is_head else self.declared.outputs)

    @property
    def start(self) -> float:
        """Factor of what it starts with by its declaration."""
        mine, its = _spread(self.declared), _spread(self.base)
        wanted = its * self.inputs**-0.5 * min(1.0, (self.outputs / self.inputs) ** 0.5)
        return 1.0 if math.isclose(mine, wanted) else wanted / mine

    @property
    def _is_head(self) -> bool:
        names = [self.declared.axes[axis] for axis in self.declared.outputs]
        return bool(self.declared.inputs) and "vocab" in names

    def _ratio(self, axes: tuple[int, ...]) -> float:
        return math.prod(self.declared.shape[axis] / self.base.shape[axis] for axis in axes)


class ParameterizationSpec(Choice, role="parameterization"):
    """What a model's width decides besides its shapes."""

    def held(self, spec: ModelSpec) -> tuple[ModelSpec, "ParameterizationSpec"]:
        """The model with the constant factors that go with its width, and what is left to do to it then."""
        return spec, self

    def growth(self, model: LanguageModel) -> Any:
        """A `Growth` for each parameter, in their shape; None where nothing differs from what they declare."""
        return None


class StandardSpec(ParameterizationSpec):
    """Every parameter starts as it declares and has the optimizer's learning rate."""

    kind: Literal["standard"] = "standard"


class MupSpec(ParameterizationSpec):
    """Maximal update parametrization: at `base_width` nothing differs from the standard one.

    Attributes:
        base_width: width at which the learning rate was tuned.
        base: values of the model that are others there, where they do not follow from the width by themselves:
            ``{blocks: {layer: {mixer: {heads: 2}}}}``.
        held_to_base: whether the model's constant factors are already those that go with its width, as in the
            `config.yaml` of a run.
    """

    kind: Literal["mup"] = "mup"
    base_width: Count
    base: dict[str, Any] = {}
    held_to_base: bool = False

    def held(self, spec: ModelSpec) -> tuple[ModelSpec, "MupSpec"]:
        if self.held_to_base:
            return spec, self
        return held_to(spec, self._base_of(spec)), self.model_copy(update={"held_to_base": True})

    def growth(self, model: LanguageModel) -> Any:
        small = LanguageModel(self._base_of(model.spec)).declarations
        if [path for path, _ in parameter_table(small)] != [path for path, _ in parameter_table(model.declarations)]:
            raise ConfigError(_OTHER_PARTS)
        return jax.tree.map(Growth, model.declarations, small, is_leaf=is_declaration)

    def _base_of(self, spec: ModelSpec) -> ModelSpec:
        """The same model at the base width."""
        values = merged(spec.dump() | {"width": self.base_width}, self.base)
        try:
            base = validate(ModelSpec, values, "model")
        except ConfigError as error:
            raise ConfigError(f"parameterization: at base_width={self.base_width}: {error}") from None
        if base.layer_names() != spec.layer_names():
            raise ConfigError(_OTHER_PARTS)
        return base


def _spread(declared: Declaration) -> float:
    """What the values a parameter starts with are proportional to; 0 where they are not drawn around zero."""
    start = declared.initializer
    if isinstance(start, Normal):
        return start.scale
    return start.high if isinstance(start, Uniform) and start.through is None and start.low == -start.high else 0.0


def started(params: Parameters, growths: Any) -> Parameters:
    """Fresh parameters as a parametrization starts them."""
    if growths is None:
        return params
    factors = jax.tree.map(lambda growth: growth.start, growths)
    return jax.tree.map(lambda value, factor: value if factor == 1.0 else value * factor, params, factors)
