"""The commands and the tables of docs/elastic.md."""

import re
from pathlib import Path
from typing import get_args

from efficient_lm.elastic.budget import BudgetSpec
from efficient_lm.elastic.importance import Order
from efficient_lm.elastic.nesting import NestingSpec
from efficient_lm.elastic.search.base import SearchSpec
from efficient_lm.models.elastic import Axis

PAGE = (Path(__file__).parents[2] / "docs" / "elastic.md").read_text()


def test_commands_are_understood(shown_command, understood):
    assert understood(shown_command)


def words(lines):
    return [line[0].strip("`") for line in lines]


def test_every_axis_order_and_way_of_training_and_searching_is_in_a_table(table):
    assert words(table(PAGE, "width")) == list(get_args(Axis))
    assert set(words(table(PAGE, "activation"))) == set(get_args(Order))
    assert set(words(table(PAGE, "sandwich"))) == set(NestingSpec.kinds)
    assert set(words(table(PAGE, "evolution"))) == set(SearchSpec.kinds)


def test_options_that_are_named_are_there():
    for root, kinds in (("nesting", NestingSpec.kinds.values()), ("search", SearchSpec.kinds.values()),
                        ("budget", [BudgetSpec])):  # fmt: skip
        named = set(re.findall(rf"(?<![.\w]){root}\.([a-z_]+)", PAGE))
        assert named and named <= set().union(*(kind.model_fields for kind in kinds)), root
