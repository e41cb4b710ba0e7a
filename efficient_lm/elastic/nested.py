"""The smaller models inside one that is trained: each by itself, as slices of the same parameters."""

from dataclasses import dataclass
from functools import cached_property

from efficient_lm.elastic.choices import Choice, choose, granularities, listed
from efficient_lm.elastic.submodels import submodel_parameters, submodel_spec
from efficient_lm.errors import ConfigError
from efficient_lm.models.elastic import ElasticSpec
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters


@dataclass(frozen=True)
class Nested:
    """One of the models inside another.

    Attributes:
        parts: what it has of each elastic axis.
        choice: the same in layers and units; None if it is all.
        model: its definition.
        whole: that of the model that holds it.
    """

    parts: dict[str, float]
    choice: Choice | None
    model: LanguageModel
    whole: LanguageModel

    @cached_property
    def is_whole(self) -> bool:
        """Whether nothing is left out."""
        return all(part == 1 for part in self.parts.values())

    @property
    def name(self) -> str:
        """What it is called in metrics and tables: ``0.5`` if all its parts are that, else ``ffn=0.5,heads=1``."""
        values = set(self.parts.values())
        if len(values) == 1:
            return f"{values.pop():g}"
        return ",".join(f"{axis}={part:g}" for axis, part in self.parts.items())

    def parameters(self, params: Parameters) -> Parameters:
        """Its part of the whole model's parameters."""
        return params if self.is_whole else submodel_parameters(self.whole, self.model, params, self.choice.layers)


def with_granularities(model: LanguageModel, elastic: ElasticSpec) -> LanguageModel:
    """The definition of a model as if it were trained to be smaller along some more axes.

    Raises:
        ConfigError: an axis that it does not have or is trained for already, or a part that leaves nothing that works.
    """
    trained = granularities(model)
    for axis, grid in elastic.axes.items():
        if axis in trained:
            raise ConfigError(f"elastic.{axis}: the model is trained for {listed(trained[axis])} of it; leave it out")
        for part in grid:
            try:
                submodel_spec(model, choose(model, {axis: part})).build()
            except ConfigError as error:
                raise ConfigError(f"elastic.{error}") from None
    both = ElasticSpec(combine=elastic.combine, **trained, **elastic.axes)
    return model.spec.model_copy(update={"elastic": both}).build()


def nested_models(model: LanguageModel) -> list[Nested]:
    """The models inside an elastic one, the whole last.

    Raises:
        ConfigError: it is not elastic, or what a part leaves does not work.
    """
    if model.spec.elastic is None:
        raise ConfigError("model.elastic: null; give the axes to nest along, such as model.elastic={ffn: [0.25,0.5,1]}")
    found = []
    for parts in model.spec.elastic.submodels:
        try:
            choice = choose(model, parts)
            small = model if all(part == 1 for part in parts.values()) else submodel_spec(model, choice).build()
        except ConfigError as error:
            raise ConfigError(f"model.elastic.{error}") from None
        found.append(Nested(parts, choice, small, model))
    return found
