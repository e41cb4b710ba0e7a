"""The commands and the options of docs/mixture_of_experts.md."""

import re
from pathlib import Path

from efficient_lm.models.ffns.moe import MoESpec
from efficient_lm.spec import Spec

PAGE = (Path(__file__).parents[2] / "docs" / "mixture_of_experts.md").read_text()


def test_commands_are_understood(shown_command, understood):
    assert understood(shown_command, from_run=["ffn=moe"])


def test_every_option_of_the_layer_is_in_the_table():
    table = set(re.findall(r"`([a-z_.]+)`", "\n".join(line for line in PAGE.splitlines() if line.startswith("| `"))))
    for name, value in MoESpec():
        inner = type(value).model_fields if isinstance(value, Spec) and name not in ("expert", "shared") else None
        wanted = {f"{name}.{key}" for key in inner} if inner else {name}
        assert name == "kind" or wanted <= table, wanted - table
