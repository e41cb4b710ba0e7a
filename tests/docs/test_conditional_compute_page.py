"""The commands and the options of docs/conditional_compute.md."""

import re
from pathlib import Path

from efficient_lm.models.depth.base import DepthSpec
from efficient_lm.models.exits import AcceleratedStreamSpec, ExitLossSpec, ExitSpec
from efficient_lm.models.skipping.base import SkippingSpec
from efficient_lm.upcycling.mixture_of_depths import DepthsSpec

PAGE = (Path(__file__).parents[2] / "docs" / "conditional_compute.md").read_text()


def words(cell):
    return set(re.findall(r"`([a-z_.]+)`", cell))


def options(spec):
    return set(spec.model_fields) - {"kind"}


def test_commands_are_understood(shown_command, understood):
    assert understood(shown_command)


def test_every_option_of_the_depth_rules_is_in_a_table(table):
    found, kind = {name: set() for name in DepthSpec.kinds}, ""
    for first, keys, _ in table(PAGE, "layer_drop"):
        kind = first.strip("`") or kind
        found[kind] |= words(keys)
    found["mixture_of_depths"] = set().union(*(words(keys) for keys, _ in table(PAGE, "weight_offset")))
    assert found == {name: options(spec) for name, spec in DepthSpec.kinds.items()}


def test_every_option_of_exits_is_in_a_table(table):
    lines = table(PAGE, "stream.rank")
    losses = {f"loss.{name}" for kind in ExitLossSpec.kinds.values() for name in options(kind)}
    streams = {f"stream.{name}" for name in options(AcceleratedStreamSpec)}
    assert set().union(*(words(keys) for keys, _ in lines)) == (options(ExitSpec) - {"stream"}) | losses | streams
    assert all(any(f"kind: {kind}" in said for _, said in lines) for kind in ExitLossSpec.kinds)


def test_every_option_of_the_policies_is_in_a_table(table):
    several = {"these three": ("confidence", "patience", "ponder"), "all": tuple(SkippingSpec.kinds)}
    found, kinds = {kind: set() for kind in SkippingSpec.kinds}, ()
    for first, keys, _ in table(PAGE, "exits_alike"):
        name = first.strip("`")
        kinds = several.get(name, (name,)) if name else kinds
        for kind in kinds:
            found[kind] |= words(keys)
    assert found == {kind: options(spec) for kind, spec in SkippingSpec.kinds.items()}


def test_the_way_from_a_dense_model_is_shown_with_its_options():
    assert all(f"method.{name}" in PAGE for name in options(DepthsSpec))
