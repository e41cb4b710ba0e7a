"""The contract of an optimizer: a direction for every parameter, from what parameters declare.

A kind says which way its gradients point (`OptimizerSpec.direction`). What is common to all is done here: the learning
rate and its multipliers, decoupled weight decay, groups of parameters, what is frozen, and how moments are kept.
A step is ``parameter -= schedule(step) * multiplier * (direction + weight_decay * parameter)``. Under muP
the direction's multiplier follows from the width; ``schedule(step) * weight_decay`` is the same at any width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from efficient_lm.errors import ConfigError, nearest
from efficient_lm.models.parameters import (
    Declaration,
    Parameters,
    is_declaration,
    map_declarations,
    parameter_table,
)
from efficient_lm.spec import Choice, Listing, OneOf, Positive, Real, Spec
from efficient_lm.training.freezing import Trainable, for_trained, matching
from efficient_lm.training.moments import Precision, kept_in
from efficient_lm.training.parameterization import Growth

ScheduleFunction = Callable[["int | jax.Array"], "jax.Array"]
"""Step (from 0) → learning rate, float32."""

NonNegative = Annotated[Real, Field(ge=0)]
"""A finite number of at least zero."""

Name = Annotated[str, Field(min_length=1)]
Names = Annotated[Listing[Name], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""A list of texts, or one."""


class OptimizerSpec(Choice, role="optimizer"):
    """An optimizer.

    Attributes:
        learning_rate: the schedule's peak.
        weight_decay: of the parameters that declare it, decoupled from the gradient (Loshchilov & Hutter 2019); a step
            takes ``learning_rate * weight_decay * parameter``.
        state: precision in which moments are kept (see `training.moments`).
        groups: parameters that are treated differently, by a name of the user's.
    """

    update_size: ClassVar[str] = "unit"
    """What decides how large a direction is: "unit", nothing (each entry is of the order of one); "gradient", the
    gradient's own size; "parameter", the parameter's."""

    whole: ClassVar[bool] = False
    """Whether it works only on all parameters at once, and so for no group."""

    replaces_decay: ClassVar[bool] = False
    """Whether what it averages stands in for a learning rate that falls."""

    learning_rate: Positive
    weight_decay: NonNegative = 0.1
    state: Precision = "float32"
    groups: dict[Name, "Group"] = {}

    def direction(self, declarations: Parameters) -> optax.GradientTransformation:
        """Gradient → what a learning rate of 1 would subtract, without weight decay.

        Args:
            declarations: of the parameters it is for; `optax.MaskedNode` stands where there is another's, or a frozen
                one, as in the trees of gradients that it is given.
        """
        raise TypeError(f"{type(self).__name__} does not define direction")

    def rate(self, growth: Growth) -> float:
        """Multiplier of the learning rate of a parameter that is larger than at the width the rate is for.

        The one that keeps what a step changes in its outputs of one size (Yang et al. 2022, table 3; see `Growth`).
        """
        inputs, outputs = growth.inputs, growth.outputs
        by_size = {
            "unit": 1 / inputs,
            "gradient": outputs / inputs,
            "parameter": inputs**-0.5 / min(1.0, (outputs / inputs) ** 0.5),
        }
        return by_size[self.update_size]

    def wrapped(self, chain: optax.GradientTransformation, schedule: ScheduleFunction) -> optax.GradientTransformation:
        """What makes the whole of directions that are decayed and multiplied by the schedule: nothing more, in most."""
        return chain

    def _of(self, group: str) -> "OptimizerSpec":
        """The optimizer of a group's parameters."""
        own = self.groups[group].optimizer if group else None
        return self if own is None else own

    def build(
        self,
        schedule: ScheduleFunction,
        declarations: Parameters,
        *,
        multipliers: Any = 1.0,
        growths: Any = None,
        chosen: Trainable | None = None,
    ) -> optax.GradientTransformation:
        """The whole transformation.

        Args:
            schedule: step → learning rate.
            declarations: of every parameter.
            multipliers: of the learning rate: a float, or a tree of floats in the shape of the parameters. They scale
                weight decay too, as another learning rate would.
            growths: a `Growth` for each parameter, whose `rate` its learning rate is multiplied by, but not its weight
                decay; None: none.
            chosen: which parameters change (see `training.freezing`); None: all. Others have no state.

        Raises:
            ConfigError: a group that matches nothing, or what another one matches.
        """
        groups = assigned(self.groups, declarations)
        treatments = multiplied(_treatments(self, groups, declarations), multipliers)
        if growths is not None:
            treatments = held(
                treatments, jax.tree.map(lambda name, growth: self._of(name).rate(growth), groups, growths)
            )
        chain = optax.chain(
            _directions(self, trained(groups, chosen), trained(declarations, chosen)),
            treated(trained(treatments, chosen)),
            optax.scale_by_learning_rate(schedule),
        )
        return for_trained(self.wrapped(chain, schedule), chosen)


class Match(Spec):
    """Which parameters a group has: those that fulfil all that is given.

    Attributes:
        paths: regular expressions; one of them is found in the parameter's dotted path.
        axes: logical axes, such as `vocab`, `experts` or `heads`; the parameter has every one.
    """

    paths: Names = ()
    axes: Names = ()

    @model_validator(mode="after")
    def _says_something(self) -> "Match":
        if not self.paths and not self.axes:
            raise PydanticCustomError("match", "give paths, axes or both: with neither a group has no parameter", {})
        return self

    def found(self, key: str, declarations: Parameters) -> set[str]:
        """Dotted paths of the parameters. Raises `ConfigError` if there are none."""
        table = parameter_table(declarations)
        names = {name for name, _ in table}
        if self.paths:
            names &= matching(f"{key}.paths", self.paths, sorted(names))
        known = {axis for _, declared in table for axis in declared.axes}
        for axis in self.axes:
            if axis not in known:
                raise ConfigError(f"{key}.axes: no parameter has the axis '{axis}'; {nearest(axis, known)}")
        names &= {name for name, declared in table if set(self.axes) <= set(declared.axes)}
        if not names:
            given = f"the axes {', '.join(self.axes)}" + (" and such a path" if self.paths else "")
            raise ConfigError(f"{key}: no parameter has {given} together")
        return names


class Group(Spec):
    """Parameters that are treated differently.

    Attributes:
        match: which ones.
        learning_rate: peak of the schedule for these; None takes the optimizer's.
        multiplier: of the optimizer's learning rate, in place of `learning_rate`.
        weight_decay: of those that declare it; None takes the optimizer's.
        state: precision of their moments; None takes the optimizer's.
        optimizer: another optimizer for these, with its own learning rate, weight decay and state.
    """

    match: Match
    learning_rate: Positive | None = None
    multiplier: Positive | None = None
    weight_decay: NonNegative | None = None
    state: Precision | None = None
    optimizer: OneOf[OptimizerSpec] | None = None

    @model_validator(mode="after")
    def _says_it_once(self) -> "Group":
        if self.learning_rate is not None and self.multiplier is not None:
            raise PydanticCustomError("group", "learning_rate and multiplier say the same; give one of them", {})
        if self.optimizer is None:
            return self
        for name in ("learning_rate", "weight_decay", "state"):
            if getattr(self, name) is not None:
                raise PydanticCustomError("group", "give optimizer.{name}, and not {name} beside it", {"name": name})
        if self.optimizer.groups:
            raise PydanticCustomError("group", "optimizer.groups: a group has no groups of its own", {})
        if self.optimizer.whole:
            kind = self.optimizer.kind
            raise PydanticCustomError(
                "group", "optimizer.kind: {kind} works only on all parameters at once", {"kind": kind}
            )
        return self


OptimizerSpec.model_rebuild()


@dataclass(frozen=True)
class Treatment:
    """What an optimizer does to one parameter besides its direction.

    Attributes:
        multiplier: of the learning rate.
        weight_decay: 0 where the parameter declares that it is not decayed.
    """

    multiplier: float
    weight_decay: float


def assigned(groups: dict[str, Group], declarations: Parameters) -> Any:
    """The group of every parameter, by name, in the shape of the parameters; "" for none.

    Raises:
        ConfigError: a group that matches nothing, or what another one matches.
    """
    of: dict[str, str] = {}
    for name, group in groups.items():
        for path in sorted(group.match.found(f"optimizer.groups.{name}.match", declarations)):
            if path in of:
                raise ConfigError(f"optimizer.groups: '{path}' is in {of[path]} and in {name}; narrow one of them down")
            of[path] = name
    names = [of.get(path, "") for path, _ in parameter_table(declarations)]
    return jax.tree.unflatten(jax.tree.structure(map_declarations(lambda declared: 0, declarations)), names)


def _treatments(spec: OptimizerSpec, groups: Any, declarations: Parameters) -> Any:
    """The treatment of every parameter, in the shape of the parameters."""

    def treatment(declared: Declaration, name: str) -> Treatment:
        group = spec.groups.get(name)
        own = spec if group is None or group.optimizer is None else group.optimizer
        rate = own.learning_rate if group is None or group.learning_rate is None else group.learning_rate
        decay = own.weight_decay if group is None or group.weight_decay is None else group.weight_decay
        multiplier = 1.0 if group is None or group.multiplier is None else group.multiplier
        return Treatment(multiplier * rate / spec.learning_rate, decay if declared.decay else 0.0)

    return jax.tree.map(treatment, declarations, groups, is_leaf=is_declaration)


def _directions(spec: OptimizerSpec, groups: Any, declarations: Parameters) -> optax.GradientTransformation:
    """Of every parameter the direction that its group's optimizer gives it, with moments kept as it says."""
    kinds: dict[str, tuple[OptimizerSpec, Precision]] = {"": (spec, spec.state)}
    for name, group in spec.groups.items():
        own = group.optimizer or spec
        kinds[name] = (own, group.state or own.state)
    distinct = [kind for place, kind in enumerate(kinds.values()) if kind not in list(kinds.values())[:place]]
    parts = []
    for own, state in distinct:
        mask = jax.tree.map(lambda name, kind=(own, state): kinds[name] == kind, groups)
        theirs = jax.tree.map(
            lambda declared, has: declared if has else optax.MaskedNode(), declarations, mask, is_leaf=is_declaration
        )
        direction = kept_in(state, own.direction(theirs))
        parts.append(direction if len(distinct) == 1 else optax.masked(direction, mask))
    return parts[0] if len(parts) == 1 else optax.chain(*parts)


def _is_description(leaf: object) -> bool:
    return isinstance(leaf, Declaration | Treatment)


def trained(tree: Any, chosen: Trainable | None) -> Any:
    """A tree with a leaf for each parameter, with `optax.MaskedNode` for those that are frozen."""
    if chosen is None:
        return tree
    return jax.tree.map(
        lambda leaf, mask: optax.MaskedNode() if mask is False else leaf, tree, chosen, is_leaf=_is_description
    )


def multiplied(treatments: Any, multipliers: Any) -> Any:
    """With the learning rates multiplied by a float, or by a tree of floats in the shape of the parameters."""
    if isinstance(multipliers, int | float):
        multipliers = jax.tree.map(lambda treatment: float(multipliers), treatments, is_leaf=_is_description)
    return jax.tree.map(
        lambda treatment, factor: replace(treatment, multiplier=treatment.multiplier * float(factor)),
        treatments,
        multipliers,
        is_leaf=_is_description,
    )


def held(treatments: Any, rates: Any) -> Any:
    """With the learning rates multiplied by a tree of floats, and as much weight decay in a step as before."""
    return jax.tree.map(
        lambda treatment, rate: Treatment(treatment.multiplier * rate, treatment.weight_decay / rate),
        treatments,
        rates,
        is_leaf=_is_description,
    )


def treated(treatments: Any) -> optax.GradientTransformation:
    """Adds weight decay to a direction, and multiplies it, parameter by parameter."""
    acts = jax.tree.map(lambda treatment: treatment != Treatment(1.0, 0.0), treatments, is_leaf=_is_description)
    acting = jax.tree.map(
        lambda treatment, does: treatment if does else optax.MaskedNode(), treatments, acts, is_leaf=_is_description
    )

    def treat(treatment: Treatment, direction: jax.Array, parameter: jax.Array) -> jax.Array:
        if treatment.weight_decay:
            direction = direction + jnp.asarray(treatment.weight_decay, direction.dtype) * parameter
        return direction if treatment.multiplier == 1.0 else direction * treatment.multiplier

    def update(directions: Parameters, params: Parameters) -> Parameters:
        return jax.tree.map(treat, acting, directions, params, is_leaf=_is_description)

    return optax.masked(optax.stateless(update), acts)


def describe(function: Callable, declarations: Parameters, *trees: Any) -> Any:
    """``function(declaration, ...)`` of every parameter, with what each of the trees has in its place."""
    return jax.tree.map(function, declarations, *trees, is_leaf=is_declaration)


def is_placeholder(params: Any) -> bool:
    """Whether `optax.tree_map_params` asks where a state has trees in the shape of the parameters."""
    return not jax.tree.leaves(params)
