"""The commands and the options of docs/mixture_of_experts.md."""

import re
import shlex
from pathlib import Path

import pytest

from efficient_lm.composition import compose
from efficient_lm.config import EvaluateConfig, RunConfig
from efficient_lm.models.ffns.moe import MoESpec
from efficient_lm.spec import Spec
from efficient_lm.upcycling.config import ExtractConfig, MergeConfig, UpcycleConfig
from efficient_lm.validation import validate

PAGE = (Path(__file__).parents[2] / "docs" / "mixture_of_experts.md").read_text()
BLOCKS = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
COMMANDS = [shlex.split(line, comments=True)[1:] for line in BLOCKS.splitlines() if line.startswith("efficient-lm")]
CONFIGS = {
    "train": RunConfig, "plan": RunConfig, "evaluate": EvaluateConfig, "upcycle": UpcycleConfig, "merge": MergeConfig,
    "extract": ExtractConfig,
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_are_understood(command):
    verb, *keys = command
    # A run to begin with is not there.
    keys = [key for key in keys if not key.startswith("init_from=")]
    keys += ["ffn=moe"] if len(keys) < len(command) - 1 else []
    # Nor are the text and the tokenizer that a plan does without.
    keys += ["data.source.paths=[text]", "tokenizer.path=tokenizer.json"] if verb == "plan" else []
    assert validate(CONFIGS[verb], compose(verb, keys).values)


def test_every_option_of_the_layer_is_in_the_table():
    table = set(re.findall(r"`([a-z_.]+)`", "\n".join(line for line in PAGE.splitlines() if line.startswith("| `"))))
    for name, value in MoESpec():
        inner = type(value).model_fields if isinstance(value, Spec) and name not in ("expert", "shared") else None
        wanted = {f"{name}.{key}" for key in inner} if inner else {name}
        assert name == "kind" or wanted <= table, wanted - table
