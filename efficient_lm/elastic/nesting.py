"""How the models inside one are trained together: which of them a step computes, and what each learns from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax import lax
from pydantic import Field

from efficient_lm.elastic.nested import Nested, nested_models
from efficient_lm.errors import ConfigError
from efficient_lm.models.language_model import LanguageModel, ModelSpec
from efficient_lm.models.parameters import Parameters
from efficient_lm.objectives.base import Batch, ObjectiveSpec, Sums
from efficient_lm.objectives.distillation import Teacher, teacher_of
from efficient_lm.spec import Choice, Listing, Natural, Positive

Found = tuple[Parameters, Sums]
"""Gradients of a loss in the shape of the whole model's parameters, and its sums."""
Gradient = Callable[[Parameters, Batch, jax.Array], Found]
"""``gradient(params, batch, key)``."""


@dataclass(frozen=True)
class Loss:
    """An objective as a step has it: with its dtype, and `held` keeping still what is not trained."""

    objective: ObjectiveSpec
    dtype: jax.typing.DTypeLike
    packed: bool
    held: Callable[[Parameters], Parameters]

    def gradient(self, each: Nested) -> Callable[..., Found]:
        """Of a model inside another; a `Teacher` it learns from may be the last argument."""

        def loss(params: Parameters, batch: Batch, key: jax.Array, *teacher: Teacher) -> tuple[jax.Array, Sums]:
            mine = each.parameters(self.held(params))
            sums = self.objective.sums(each.model, mine, batch, self.dtype, self.packed, key, *teacher)
            return sums.loss, sums

        return jax.grad(loss, has_aux=True)

    def teacher(self, model: LanguageModel, params: Parameters, batch: Batch) -> Teacher:
        """What a model says of a batch."""
        return teacher_of(model, params, batch, self.dtype, self.packed)


class NestingSpec(Choice, role="nesting"):
    """A way to train the models inside an elastic one (`model.elastic`)."""

    def check(self, spec: ModelSpec) -> None:
        """Whether it can train a model. Raises `ConfigError`."""
        if spec.elastic is None:
            raise ConfigError(
                f"nesting: '{self.kind}' trains the models inside an elastic one, and model.elastic is null; "
                "give its axes, such as model.elastic.ffn=[0.25,0.5,1], or leave nesting at none"
            )
        count = len(spec.elastic.submodels)
        for name in ("probabilities", "weights"):
            shares(name, getattr(self, name, None), count)

    def gradient(self, model: LanguageModel, loss: Loss) -> Gradient:
        """What a step computes, of a model that `check` has passed."""
        raise TypeError(f"{type(self).__name__} does not define gradient")

    def cost(self, flops: Sequence[float]) -> float:
        """FLOPs per token of a step on average, of those of a plain step of every model, the whole last."""
        raise TypeError(f"{type(self).__name__} does not define cost")


class NoNestingSpec(NestingSpec):
    """The whole model alone."""

    kind: Literal["none"] = "none"

    def check(self, spec: ModelSpec) -> None:
        """Any model can be trained by itself."""

    def gradient(self, model: LanguageModel, loss: Loss) -> Gradient:
        return loss.gradient(Nested({}, None, model, model))

    def cost(self, flops: Sequence[float]) -> float:
        return flops[-1]


WHOLE = NoNestingSpec()


class SampleSpec(NestingSpec):
    """One of the models in every step, drawn at random (MatFormer, Devvrit et al. 2024, section 3.2).

    Attributes:
        probabilities: of each model, the whole last; null: all alike.
    """

    kind: Literal["sample"] = "sample"
    probabilities: Annotated[Listing[Positive], Field(min_length=1)] | None = None

    def gradient(self, model: LanguageModel, loss: Loss) -> Gradient:
        nested = nested_models(model)
        logits = jnp.log(jnp.asarray(shares("probabilities", self.probabilities, len(nested))))
        parts = [loss.gradient(each) for each in nested]

        def gradient(params: Parameters, batch: Batch, key: jax.Array) -> Found:
            drawn, own = jax.random.split(key)
            return _one_of(parts, jax.random.categorical(drawn, logits), params, batch, own)

        return gradient

    def cost(self, flops: Sequence[float]) -> float:
        return sum(map(float.__mul__, shares("probabilities", self.probabilities, len(flops)), flops))


class JointSpec(NestingSpec):
    """All models in every step (MatFormer, eq. 3).

    Attributes:
        weights: of each model's loss, the whole last; null: all alike.
        average: whether the losses are averaged, so that weights are relative to each other; false: added.
    """

    kind: Literal["joint"] = "joint"
    weights: Annotated[Listing[Positive], Field(min_length=1)] | None = None
    average: bool = True

    def gradient(self, model: LanguageModel, loss: Loss) -> Gradient:
        nested = nested_models(model)
        added = self.weights or (1.0,) * len(nested)
        weights = shares("weights", self.weights, len(nested)) if self.average else added
        parts = [loss.gradient(each) for each in nested]

        def gradient(params: Parameters, batch: Batch, key: jax.Array) -> Found:
            found = [part(params, batch, jax.random.fold_in(key, place)) for place, part in enumerate(parts)]
            return _added(found, weights, [each.name for each in nested])

        return gradient

    def cost(self, flops: Sequence[float]) -> float:
        return sum(flops)


class SandwichSpec(NestingSpec):
    """The largest, the smallest, and some between in every step (Yu & Huang 2019, arXiv 1903.05134, section 3).

    Attributes:
        between: how many of the others, drawn anew in each step.
        distill: whether all but the largest learn its distribution of the next token in place of the text's
            (in-place distillation, section 3.3).
    """

    kind: Literal["sandwich"] = "sandwich"
    between: Natural = 1
    distill: bool = True

    def gradient(self, model: LanguageModel, loss: Loss) -> Gradient:
        *small, whole = nested = nested_models(model)
        parts, largest = [loss.gradient(each) for each in small], loss.gradient(whole)
        count = min(self.between, len(small) - 1)
        names = [nested[-1].name, small[0].name, *(f"between_{place}" for place in range(count))]

        def gradient(params: Parameters, batch: Batch, key: jax.Array) -> Found:
            keys = jax.random.split(key, count + 3)
            teacher = (loss.teacher(model, params, batch),) if self.distill else ()
            found = [largest(params, batch, keys[0]), parts[0](params, batch, keys[1], *teacher)]
            places = jax.random.permutation(keys[2], len(small) - 1)[:count]
            found += [
                _one_of(parts[1:], place, params, batch, own, *teacher)
                for place, own in zip(places, keys[3:], strict=True)
            ]
            return _added(found[::-1], [1 / len(found)] * len(found), names[::-1])

        return gradient

    def cost(self, flops: Sequence[float]) -> float:
        between = flops[1:-1]
        mean = sum(between) / len(between) if between else 0.0
        teacher = flops[-1] / 3 if self.distill else 0.0
        return flops[-1] + flops[0] + min(self.between, len(between)) * mean + teacher


def shares(name: str, given: Sequence[float] | None, count: int) -> list[float]:
    """`count` values that add up to one. Raises `ConfigError` if not so many are given."""
    values = (1.0,) * count if given is None else given
    if len(values) != count:
        raise ConfigError(f"nesting.{name}: {len(values)} values, but model.elastic makes {count} models")
    return [value / sum(values) for value in values]


def _one_of(parts: Sequence[Callable[..., Found]], place: jax.Array, *arguments: object) -> Found:
    """What the part at a place finds. What layers counted is of the last alone, if the others count less."""
    shapes = jax.eval_shape(parts[-1], *arguments)[1].counts

    def branch(part: Callable[..., Found]) -> Callable[..., Found]:
        def run(*arguments: object) -> Found:
            grads, sums = part(*arguments)
            same = jax.tree.map(jnp.shape, sums.counts) == jax.tree.map(lambda leaf: leaf.shape, shapes)
            counts = sums.counts if same else jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            return grads, sums._replace(counts=counts)

        return run

    grads, sums = lax.switch(place, [branch(part) for part in parts], *arguments)
    return grads, sums._replace(metrics=sums.metrics | {"submodel": place * sums.weight})


def _added(found: Sequence[Found], weights: Sequence[float], names: Sequence[str]) -> Found:
    """The weighted sum of gradients; the sums are those of the last, with the cross entropy of every model by name."""
    grads = jax.tree.map(
        lambda *leaves: sum(weight * leaf for weight, leaf in zip(weights, leaves, strict=True)),
        *(grads for grads, _ in found),
    )
    whole = found[-1][1]
    own = {
        f"cross_entropy_{name}": sums.metrics["cross_entropy"]
        for name, (_, sums) in zip(names[:-1], found[:-1], strict=True)
    }
    return grads, whole._replace(metrics=whole.metrics | own)
