"""The commands and the keys of the pages on training, and the README's."""

import re
from pathlib import Path
from typing import get_args

import pytest

from efficient_lm.config import RunConfig
from efficient_lm.spec import Choice, Spec

ROOT = Path(__file__).parents[2]
NAMES = ("optimizers", "schedules_and_mup", "parallelism", "many_processes", "reliability", "resuming", "security")
PAGE = "\n".join(path.read_text() for path in [*(ROOT / "docs" / f"{name}.md" for name in NAMES), ROOT / "README.md"])
NAMED = sorted(set(re.findall(r"`((?:train|optimizer|schedule|parallelism|parameterization)(?:\.[a-z_]+)+)", PAGE)))


def test_commands_are_understood(shown_command, understood):
    assert understood(shown_command)


def specs(annotation):
    """The specs that a value of this type may be."""
    if isinstance(annotation, type) and issubclass(annotation, Choice):
        return list(annotation.kinds.values())
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [spec for argument in get_args(annotation) for spec in specs(argument)]


@pytest.mark.parametrize("key", NAMED)
def test_keys_that_are_named_are_there(key):
    found = [RunConfig]
    for name in key.split("."):
        fields = [spec.model_fields[name] for spec in found if name in spec.model_fields]
        assert fields, f"{name} of {key}"
        found = [spec for field in fields for spec in specs(field.annotation)]
