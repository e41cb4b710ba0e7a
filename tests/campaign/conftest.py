"""What both campaigns share: a text, a cache of their own, and the places of a config that hold one value each."""

import json
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

import pytest

from efficient_lm.spec import Spec


class Place(NamedTuple):
    """One value of a config.

    Attributes:
        key: dotted, as a command line says it.
        value: what is there.
        owner: the spec it is a field of.
        field: its pydantic field.
    """

    key: str
    value: Any
    owner: Spec
    field: Any

    @property
    def members(self) -> list[Any]:
        """The types it may have: those of a union one by one, each with its annotations."""
        marks = self.field.metadata
        return _members(Annotated[self.field.annotation, *marks] if marks else self.field.annotation)


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        members = _members(inner)
        return members if len(members) > 1 else [Annotated[members[0], *marks]]
    return [annotation]


def _places(spec: Spec, prefix: str = "") -> Iterator[Place]:
    for name, field in type(spec).model_fields.items():
        value, key = getattr(spec, name), f"{prefix}{field.alias or name}"
        if isinstance(value, Spec):
            yield from _places(value, f"{key}.")
        elif isinstance(value, Mapping) and any(isinstance(part, Spec) for part in value.values()):
            for inner, part in value.items():
                yield from _places(part, f"{key}.{inner}.")
        elif name != "kind":
            yield Place(key, value, spec, field)


@pytest.fixture(scope="session")
def places():
    """``places(config)`` → every value in it that is neither a part nor a kind."""
    return lambda config: list(_places(config))


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A file of 40 short documents."""
    path = tmp_path_factory.mktemp("text") / "numbers.jsonl"
    lines = [{"text": f"{number} and {number * number} are numbers, and so is {number**3}"} for number in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> Iterator[None]:
    """Encoded texts are kept with the test's other files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFICIENT_LM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
