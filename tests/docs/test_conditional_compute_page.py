"""The commands and the options of docs/conditional_compute.md."""

import re
import shlex
from pathlib import Path

import pytest

from efficient_lm.composition import compose
from efficient_lm.config import EvaluateConfig, GenerateConfig, RunConfig
from efficient_lm.models.depth.base import DepthSpec
from efficient_lm.models.exits import AcceleratedStreamSpec, ExitLossSpec, ExitSpec
from efficient_lm.models.skipping.base import SkippingSpec
from efficient_lm.upcycling.config import UpcycleConfig
from efficient_lm.upcycling.mixture_of_depths import DepthsSpec
from efficient_lm.validation import validate

PAGE = (Path(__file__).parents[2] / "docs" / "conditional_compute.md").read_text()
BLOCKS = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
COMMANDS = [shlex.split(line, comments=True)[1:] for line in BLOCKS.splitlines() if line.startswith("efficient-lm")]
CONFIGS = {
    "train": RunConfig, "plan": RunConfig, "evaluate": EvaluateConfig, "generate": GenerateConfig,
    "upcycle": UpcycleConfig,
}  # fmt: skip
TABLES = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)


def cells(word):
    """The cells of the table that has this word, line by line, without its heading."""
    table = next(table for table in TABLES if f"`{word}`" in table)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def words(cell):
    return set(re.findall(r"`([a-z_.]+)`", cell))


def options(spec):
    return set(spec.model_fields) - {"kind"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_are_understood(command):
    verb, *keys = command
    # A run to begin with is not there.
    keys = [key for key in keys if not key.startswith("init_from=")]
    # Nor are the text and the tokenizer that a plan does without.
    keys += ["data.source.paths=[text]", "tokenizer.path=tokenizer.json"] if verb == "plan" else []
    assert validate(CONFIGS[verb], compose(verb, keys).values)


def test_every_option_of_the_depth_rules_is_in_a_table():
    found, kind = {name: set() for name in DepthSpec.kinds}, ""
    for first, keys, _ in cells("layer_drop"):
        kind = first.strip("`") or kind
        found[kind] |= words(keys)
    found["mixture_of_depths"] = set().union(*(words(keys) for keys, _ in cells("weight_offset")))
    assert found == {name: options(spec) for name, spec in DepthSpec.kinds.items()}


def test_every_option_of_exits_is_in_a_table():
    table = cells("stream.rank")
    losses = {f"loss.{name}" for kind in ExitLossSpec.kinds.values() for name in options(kind)}
    streams = {f"stream.{name}" for name in options(AcceleratedStreamSpec)}
    assert set().union(*(words(keys) for keys, _ in table)) == (options(ExitSpec) - {"stream"}) | losses | streams
    assert all(any(f"kind: {kind}" in said for _, said in table) for kind in ExitLossSpec.kinds)


def test_every_option_of_the_policies_is_in_a_table():
    several = {"these three": ("confidence", "patience", "ponder"), "all": tuple(SkippingSpec.kinds)}
    found, kinds = {kind: set() for kind in SkippingSpec.kinds}, ()
    for first, keys, _ in cells("exits_alike"):
        name = first.strip("`")
        kinds = several.get(name, (name,)) if name else kinds
        for kind in kinds:
            found[kind] |= words(keys)
    assert found == {kind: options(spec) for kind, spec in SkippingSpec.kinds.items()}


def test_the_way_from_a_dense_model_is_shown_with_its_options():
    assert all(f"method.{name}" in BLOCKS for name in options(DepthsSpec))
