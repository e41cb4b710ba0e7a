"""Specs: frozen, strict descriptions of every part a user can choose, selected in YAML by `kind`.

A role (mixer, ffn, tokenizer, ...) is a base class declared with ``class MixerSpec(Choice, role="mixer")``. Each kind
is a subclass whose ``kind: Literal["attention"] = "attention"`` names it; defining the class registers it. A field
``mixer: OneOf[MixerSpec]`` then accepts any registered kind. A kind is a name and never a Python path, so a config
that comes with a downloaded checkpoint cannot run code.
"""

import importlib
import math
import pkgutil
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, StrictFloat, StrictInt, model_validator
from pydantic_core import PydanticCustomError, core_schema

from efficient_lm.errors import ConfigError, nearest

PLUGINS = "efficient_lm.plugins"
T = TypeVar("T")


class Spec(BaseModel):
    """A frozen description that refuses unknown keys and does not convert between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    composed_groups: ClassVar[tuple[str, ...]] = ()
    """What a command line may choose beside the keys: groups of configs that go into other sections."""

    @classmethod
    def keys(cls) -> list[str]:
        """The keys a user may write."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    def dump(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, as written to `config.yaml`; validating them gives the spec back."""
        return self.model_dump(mode="json", by_alias=True, serialize_as_any=True)

    def within(self, key: str) -> Iterator[tuple[str, "Spec"]]:
        """This spec and all those inside of it, each with its dotted key; `key` is its own."""
        yield key, self
        for name, field in type(self).model_fields.items():
            value, name = getattr(self, name), f"{key}.{field.alias or name}"
            parts = {f"{name}.{inner}": part for inner, part in value.items()} if isinstance(value, Mapping) else {}
            for inner, part in (parts or {name: value}).items():
                if isinstance(part, Spec):
                    yield from part.within(inner)

    def at(self, index: int, count: int) -> "Spec":
        """The spec of occurrence `index` of `count`, with every value that varies with depth replaced by its own.

        Raises:
            ConfigError: a list whose length is not `count`.
        """
        changes = {}
        for name, value in self:
            resolved = _at(value, index, count, name, _varies(type(self).model_fields[name]))
            if resolved is not value:
                changes[name] = resolved
        return self.model_copy(update=changes) if changes else self


class Choice(Spec):
    """A spec selected by `kind` within its role."""

    role: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type["Choice"]]]

    def __init_subclass__(cls, role: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

    @classmethod
    def __pydantic_init_subclass__(cls, role: str | None = None, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if role is not None:
            cls.role, cls.kinds = role, {}
        elif "kind" in cls.model_fields:
            cls.kinds[cls.model_fields["kind"].default] = cls

    @classmethod
    def lookup(cls, kind: object) -> type["Choice"]:
        """The class of a kind. Raises `PydanticCustomError` naming the nearest kinds."""
        if not isinstance(kind, str) or kind not in cls.kinds:
            hint = nearest(kind, cls.kinds)
            raise PydanticCustomError(
                "kind", "unknown {role} kind '{kind}'; {hint}", {"role": cls.role, "kind": str(kind), "hint": hint}
            )
        return cls.kinds[kind]


class _ByKind:
    """Pydantic annotation that validates a mapping by the class its `kind` names."""

    def __init__(self, base: type[Choice]):
        self.base = base

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        def validate(value: Any) -> Choice:
            if isinstance(value, self.base):
                return value
            if not isinstance(value, Mapping) or "kind" not in value:
                hint = nearest("", self.base.kinds)
                raise PydanticCustomError("kind", "expected a mapping with the key 'kind' ({hint})", {"hint": hint})
            return self.base.lookup(value["kind"]).model_validate(dict(value))

        return core_schema.no_info_plain_validator_function(
            validate,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda value: value.dump()),
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"oneOf": [_described(kind, handler) for kind in self.base.kinds.values()]}


_describing: set[type[Choice]] = set()
"""Kinds whose JSON schema is being made."""


def _described(kind: type[Choice], handler: Any) -> dict[str, Any]:
    """The JSON schema of a kind, once; a reference where the kind is met again, inside itself too."""
    whole = kind.__pydantic_core_schema__
    ref = f"{kind.__module__}.{kind.__qualname__}:{id(kind)}"
    if kind in _describing:
        return handler(core_schema.definition_reference_schema(ref))
    _describing.add(kind)
    try:
        model, others = (whole["schema"], whole["definitions"]) if whole["type"] == "definitions" else (whole, [])
        return handler(core_schema.definitions_schema({**model, "ref": ref}, others))
    finally:
        _describing.discard(kind)


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `values`; a mapping that names its `kind` replaces the one that is there."""
    inner = {
        name: merged(values[name], change)
        for name, change in changes.items()
        if isinstance(change, Mapping) and "kind" not in change and isinstance(values.get(name), Mapping)
    }
    return {**values, **changes, **inner}


class OneOf:
    """``OneOf[MixerSpec]``: any registered kind of that role."""

    def __class_getitem__(cls, base: type[Choice]) -> Any:
        return Annotated[base, _ByKind(base)]


def load_kinds(package: str, path: list[str]) -> None:
    """Import every module of a package, so that each one's kinds register themselves."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def load_plugins() -> None:
    """Import what installed packages add under the entry-point group `efficient_lm.plugins`."""
    for plugin in entry_points(group=PLUGINS):
        try:
            plugin.load()
        except Exception as error:
            raise ConfigError(f"plugin '{plugin.name}' ({plugin.value}) failed to load: {error}") from error


def _whole(value: Any) -> Any:
    """YAML reads 1e4 as a float; a count may be written so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _real(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


Count = Annotated[StrictInt, BeforeValidator(_whole), Field(ge=1)]
"""A whole number of at least one; ``1e4`` is accepted for 10000."""

Natural = Annotated[StrictInt, BeforeValidator(_whole), Field(ge=0)]
"""A whole number of at least zero."""

Real = Annotated[StrictFloat, BeforeValidator(_real), Field(allow_inf_nan=False)]
"""A finite number."""

Positive = Annotated[StrictFloat, BeforeValidator(_real), Field(gt=0, allow_inf_nan=False)]
"""A finite number above zero."""

Fraction = Annotated[StrictFloat, BeforeValidator(_real), Field(ge=0, le=1)]
"""A number from zero to one."""


class Listing:
    """``Listing[int]``: a YAML list, kept as a tuple."""

    def __class_getitem__(cls, item: Any) -> Any:
        return Annotated[tuple[item, ...], Strict(False)]


class Ramp(Spec):
    """A value that goes linearly with depth from `start` (first occurrence) to `end` (last)."""

    start: Real
    end: Real

    def value(self, index: int, count: int, whole: bool) -> float | int:
        value = self.start + (self.end - self.start) * (index / max(count - 1, 1))
        return round(value) if whole else value

    @model_validator(mode="before")
    @classmethod
    def _needs_both(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and set(value) != {"start", "end"}:
            raise _no_schedule()
        return value


class Cosine(Spec):
    """A value that goes with depth as half a period of a cosine around `center`, and stays within `least` and `most`.

    Of occurrence i of n: ``clip(center + amplitude * cos(π i / (n - 1)), least, most)``.
    """

    center: Real
    amplitude: Real = 0.5
    least: Real | None = None
    most: Real | None = None

    def value(self, index: int, count: int, whole: bool) -> float | int:
        value = self.center + self.amplitude * math.cos(math.pi * index / max(count - 1, 1))
        value = value if self.least is None else max(value, self.least)
        value = value if self.most is None else min(value, self.most)
        return round(value) if whole else value

    @model_validator(mode="before")
    @classmethod
    def _needs_center(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and not {"center"} <= set(value) <= set(cls.model_fields):
            raise _no_schedule()
        return value


def _no_schedule() -> PydanticCustomError:
    return PydanticCustomError(
        "schedule",
        "a value that varies with depth is a list, or a mapping with 'start' and 'end', or with 'center' and, unless "
        "left out, 'amplitude', 'least' and 'most'",
        {},
    )


class _Varies:
    """Marks a field whose value may differ from layer to layer."""

    def __init__(self, whole: bool):
        self.whole = whole


class PerLayer:
    """``PerLayer[int]``: one value, a list with one value per layer that uses the block, a `Ramp` or a `Cosine`."""

    def __class_getitem__(cls, item: Any) -> Any:
        whole = float not in _flat(item)
        return Annotated[item | Ramp | Cosine | Annotated[tuple[item, ...], Strict(False)], _Varies(whole)]


def _flat(item: Any) -> list[Any]:
    arguments = get_args(item)
    return [item] + [leaf for argument in arguments for leaf in _flat(argument)]


def _varies(field: Any) -> _Varies | None:
    return next((mark for mark in field.metadata if isinstance(mark, _Varies)), None)


def _at(value: Any, index: int, count: int, name: str, mark: _Varies | None) -> Any:
    if mark and isinstance(value, tuple):
        if len(value) != count:
            raise ConfigError(
                f"'{name}' lists {len(value)} values, but {count} layers use it: give one value, or {count}"
            )
        return value[index]
    if mark and isinstance(value, Ramp | Cosine):
        return value.value(index, count, mark.whole)
    return value.at(index, count) if isinstance(value, Spec) else value
