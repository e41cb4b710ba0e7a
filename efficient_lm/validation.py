"""Plain mapping → spec, and the few lines a user reads when they do not fit."""

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

from efficient_lm.errors import ConfigError, nearest
from efficient_lm.spec import Choice, Spec

Path = tuple[str | int, ...]

SHOWN = 3
"""Faults named in one message."""

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "some text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "at most {le}",
}


_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


def validate[S: Spec](spec: type[S], values: Mapping[str, Any], prefix: str = "") -> S:
    """The spec of plain values.

    Args:
        prefix: dotted place of `values`, for messages.

    Raises:
        ConfigError: up to three faults, one ``key: what; hint`` per line.
    """
    try:
        return spec.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(spec, values, error, prefix)) from error


def of_kind(spec: type[Spec], key: str, part: Any, options: Mapping[str, Any]) -> Any:
    """A part that is said by its kind, with its attributes as `options`; or given whole.

    Args:
        spec: has such a part as its field `key`.

    Raises:
        ConfigError: what `validate` raises, or attributes beside a whole part.
    """
    if isinstance(part, str):
        return getattr(validate(spec, {key: {"kind": part, **options}}), key)
    for name in options:
        raise ConfigError(f"{key}.{name}: goes with the name of a kind; set it in what is given, or leave it out")
    return part


def _explain(spec: type[Spec], values: Any, error: ValidationError, prefix: str) -> str:
    faults: dict[Path, list[dict[str, Any]]] = {}
    for fault in error.errors(include_url=False):
        faults.setdefault(_place(values, fault), []).append(fault)
    lines = []
    # A misspelt key comes before what is missing for want of it.
    for place, found in sorted(faults.items(), key=lambda item: item[1][0]["type"] == "missing"):
        if any(_deeper(other, place) for other in faults):
            continue
        key = ".".join(filter(None, [prefix, *map(str, place)]))
        lines.append(_line(key, spec, values, place, found))
    more = len(lines) - SHOWN
    return "\n".join(lines[:SHOWN] + ([f"and {more} more"] if more > 0 else []))


def _place(values: Any, fault: dict[str, Any]) -> Path:
    """The keys that lead to a fault. Pydantic also names the branch of a union it tried, which no user wrote."""
    place: list[str | int] = []
    here = values
    for step in fault["loc"]:
        if isinstance(here, Mapping) and step in here:
            here = here[step]
        elif isinstance(here, Sequence) and not isinstance(here, str) and isinstance(step, int) and step < len(here):
            here = here[step]
        else:
            continue
        place.append(step)
    if fault["type"] == "missing":
        place.append(fault["loc"][-1])
    elif fault["type"] == "kind" and isinstance(here, Mapping) and "kind" in here:
        place.append("kind")
    return tuple(place)


def _deeper(other: Path, place: Path) -> bool:
    """Whether `other` says more exactly what is wrong at `place`: of a union, the branch that fits the value."""
    return len(other) > len(place) and other[: len(place)] == place


def _line(key: str, spec: type[Spec], values: Any, place: Path, faults: list[dict[str, Any]]) -> str:
    kinds = {fault["type"] for fault in faults}
    if "extra_forbidden" in kinds and place[-1] == "_target_":
        return f"{key}: a Python path, which is never followed; {nearest('kind', _keys(spec, values, place[:-1]))}"
    if "extra_forbidden" in kinds:
        groups = () if place[:-1] else spec.composed_groups
        return f"{key}: unknown key; {nearest(place[-1], [*_keys(spec, values, place[:-1]), *groups])}"
    if "missing" in kinds:
        return f"{key}: a value is needed"
    if len(faults) == 1 and not kinds & {*_WANTED, "literal_error", "too_short", "too_long"}:
        said = _said(faults[0])
        return f"{key}: {said}; got {_shown(faults[0]['input'])}" if said.startswith("expected") else f"{key}: {said}"
    # A number out of bounds is of the right type: what other types would do is beside the point.
    faults = [fault for fault in faults if fault["type"] in _BOUNDS] or faults
    given = faults[0]["input"]
    choices = [choice for fault in faults for choice in _choices(fault)]
    wanted = list(dict.fromkeys(_want(fault) for fault in faults if fault["type"] != "literal_error"))
    if choices and not wanted:
        return f"{key}: '{given}' is not valid; {nearest(given, choices)}"
    wanted += [f"'{choice}'" for choice in choices]
    return f"{key}: expected {' or '.join(wanted)}; got {_shown(given)}"


def _said(fault: dict[str, Any]) -> str:
    return fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")


def _choices(fault: dict[str, Any]) -> list[str]:
    if fault["type"] != "literal_error":
        return []
    return [choice.strip().strip("'") for choice in fault["ctx"]["expected"].replace(" or ", ", ").split(", ")]


def _want(fault: dict[str, Any]) -> str:
    if fault["type"] in ("too_short", "too_long"):
        limit = fault["ctx"].get("min_length", fault["ctx"].get("max_length"))
        return f"at {'least' if fault['type'] == 'too_short' else 'most'} {limit} item{'s' if limit != 1 else ''}"
    if fault["type"] == "schedule" or fault.get("ctx", {}).get("class_name") in ("Ramp", "Cosine"):
        return "a mapping with 'start' and 'end' or with 'center'"
    wanted = _WANTED.get(fault["type"])
    return wanted.format(**_numbers(fault.get("ctx", {}))) if wanted else _said(fault)


def _numbers(context: dict[str, Any]) -> dict[str, Any]:
    return {name: f"{value:g}" if isinstance(value, int | float) else value for name, value in context.items()}


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"the text '{value[:60]}'" if value else "none"
    if isinstance(value, Mapping):
        return f"a mapping ({', '.join(map(str, list(value)[:4]))})" if value else "an empty mapping"
    return f"a list of {len(value)}" if isinstance(value, list | tuple) else f"{value}"


def _keys(spec: type[Spec], values: Any, place: Path) -> list[str]:
    """The keys that are valid at a place."""
    found: list[Any] = [spec]
    here = values
    for step in place:
        here = here[step]
        found = [inner for annotation in found for inner in _inner(annotation, step)]
    classes = [candidate for annotation in found for candidate in _classes(annotation, here)]
    return list(dict.fromkeys(key for candidate in classes for key in candidate.keys()))


def _inner(annotation: Any, step: str | int) -> list[Any]:
    """What a type says of its key or item `step`; a spec given by role says so of each of its kinds."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        owners = annotation.__dict__.get("kinds", {}).values() or [annotation]
        fields = [
            field for owner in owners for name, field in owner.model_fields.items() if step in (name, field.alias)
        ]
        return [part for field in fields for part in _parts(field.annotation)]
    arguments = get_args(annotation)
    if get_origin(annotation) is dict:
        return _parts(arguments[1])
    return [part for argument in arguments for part in _parts(argument)]


def _parts(annotation: Any) -> list[Any]:
    """The members of a union, without their annotations."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _parts(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [part for argument in get_args(annotation) for part in _parts(argument)]
    return [] if origin is Literal else [annotation]


def _classes(annotation: Any, value: Any) -> list[type[Spec]]:
    """The specs a mapping at this place may be of: by its kind where it has one."""
    if not (isinstance(annotation, type) and issubclass(annotation, Spec)):
        return []
    if issubclass(annotation, Choice) and "kinds" in annotation.__dict__:
        chosen = annotation.kinds.get(value.get("kind")) if isinstance(value, Mapping) else None
        return [chosen] if chosen else list(annotation.kinds.values())
    return [annotation]
