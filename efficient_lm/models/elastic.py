"""Axes along which parts of a model have smaller ones inside: their first units are a part of the same kind."""

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from efficient_lm.errors import ConfigError
from efficient_lm.spec import Count, Listing, Natural, Positive, Spec

Axis = Literal["ffn", "heads", "state", "experts", "rank", "layers", "width"]
"""What a model may be made smaller along.

``ffn``: hidden units of channel mixers and of experts; ``heads``: groups of heads that share keys and values, heads of
recurrent mixers, or channels of those without heads; ``state``: values of a recurrent state; ``experts``; ``rank`` of
maps through a bottleneck; ``layers``; ``width`` of the residual stream.
"""

AXES: tuple[str, ...] = get_args(Axis)

LAID_ALONG = {
    "ffn": ("mlp",),
    "heads": ("groups", "kv_heads", "heads", "inner"),
    "state": ("state",),
    "experts": ("experts",),
    "rank": ("rank",),
}
"""By axis, the logical axes of parameters that its units lie along, each unit in as many consecutive places."""

READ_BY = {"ffn": "down", "heads": "output"}
"""By axis, the name of the linear map whose inputs its units are."""


class Elastic:
    """What a resolved spec says of the smaller ones inside it. What is not elastic has no axes."""

    def counted(self) -> dict[str, tuple[str, ...]]:
        """By axis, the fields that count its units: the first as they are, the others in multiples of it."""
        return {}

    def axis_sizes(self) -> dict[str, int]:
        """How many units each of its axes has."""
        return {axis: getattr(self, fields[0]) for axis, fields in self.counted().items()}

    def laid_along(self) -> dict[str, tuple[str, ...]]:
        """By axis, the logical axes of its parameters that its own units lie along (see `LAID_ALONG`)."""
        return {axis: LAID_ALONG[axis] for axis in self.counted()}

    def inside(self) -> dict[str, "Elastic"]:
        """Parts of it that have units of their own, by the name of their parameters."""
        return {}

    def fixed(self) -> dict[str, str]:
        """Axes whose units mean something by their place and cannot change it, each with the reason."""
        return {}

    def cut(self, units: Mapping[str, int]) -> Self:
        """The same with the first so many units of some axes; those it does not have are of no concern."""
        changes = {}
        for axis, (first, *others) in self.counted().items():
            if axis in units:
                whole = getattr(self, first)
                changes |= {name: getattr(self, name) * units[axis] // whole for name in (first, *others)}
        return self.model_copy(update=changes)


def _ascending(values: tuple[float, ...]) -> tuple[float, ...]:
    for value in values:
        if value > 1:
            raise _wrong(f"a granularity is a part of the whole, above 0 and at most 1; got {value:g}")
    if list(values) != sorted(set(values)) or values[-1] != 1:
        raise _wrong(f"granularities ascend and end with 1; got {', '.join(f'{value:g}' for value in values)}")
    return values


def _wrong(said: str) -> PydanticCustomError:
    return PydanticCustomError("granularity", "{said}", {"said": said})


Granularities = Annotated[Listing[Positive], Field(min_length=1), AfterValidator(_ascending)]
"""Parts of an axis that are models by themselves, ascending, the whole last."""


class NumberingSpec(Spec):
    """The places of layers in the model they come from, for parts that go by their place.

    Attributes:
        layers: the number of each layer there, from 0.
        of: how many there were.
    """

    layers: Listing[Natural]
    of: Count


class ElasticSpec(Spec):
    """What smaller models there are inside a model (MatFormer, Devvrit et al. 2024, arXiv 2310.07707).

    Attributes:
        ffn, heads, state, experts, rank, layers, width: granularities of these axes (see `Axis`), ``[0.25, 0.5, 1]``;
            null: the axis is not elastic.
        combine: which granularities go together: ``together``, the smallest of every axis, then the next, an axis with
            fewer of them being whole in what is left; ``apart``, each with each.
    """

    ffn: Granularities | None = None
    heads: Granularities | None = None
    state: Granularities | None = None
    experts: Granularities | None = None
    rank: Granularities | None = None
    layers: Granularities | None = None
    width: Granularities | None = None
    combine: Literal["together", "apart"] = "together"

    @model_validator(mode="after")
    def _nests(self) -> "ElasticSpec":
        if len(self.submodels) < 2:
            raise _wrong(
                "there is nothing smaller inside: give an axis two granularities, such as ffn: [0.5, 1]; or null"
            )
        return self

    @property
    def axes(self) -> dict[str, tuple[float, ...]]:
        """The granularities of each elastic axis."""
        return {axis: getattr(self, axis) for axis in AXES if getattr(self, axis) is not None}

    @property
    def submodels(self) -> list[dict[str, float]]:
        """The part of each axis that each submodel has, the whole model last."""
        axes = self.axes
        if self.combine == "apart":
            return [dict(zip(axes, parts, strict=True)) for parts in itertools.product(*axes.values())]
        count = max((len(parts) for parts in axes.values()), default=1)
        return [{axis: parts[min(i, len(parts) - 1)] for axis, parts in axes.items()} for i in range(count)]


def without_axis(elastic: ElasticSpec | None, axis: Axis) -> dict[str, Any] | None:
    """What smaller models there still are, as values, once the units of an axis are others or in another order."""
    grids = {} if elastic is None else elastic.axes
    left = {name: grid for name, grid in grids.items() if name != axis and len(grid) > 1}
    return {"combine": elastic.combine, **left} if left else None


MATFORMER = ElasticSpec(ffn=(0.125, 0.25, 0.5, 1))
"""What is trained where nobody says what (Devvrit et al. 2024, section 3.1)."""


def whole_units(axis: str, part: float, units: int) -> int:
    """So many of `units` as the part is. Raises `ConfigError` unless it is a whole number."""
    exact = part * units
    if abs(exact - round(exact)) > 1e-6 * units or round(exact) < 1:
        below, above = int(exact), min(int(exact) + 1, units)
        valid = " or ".join(f"{count / units:.6g}" for count in (below, above) if count)
        raise ConfigError(f"{axis}: {part:g} of {units} is no whole number; nearest: {valid}")
    return round(exact)
