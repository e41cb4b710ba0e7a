"""The commands and the tables of docs/elastic.md."""

import re
import shlex
from pathlib import Path
from typing import get_args

from efficient_lm.cli.extract import HELP
from efficient_lm.elastic.budget import BudgetSpec
from efficient_lm.elastic.choices import choose
from efficient_lm.elastic.importance import Order
from efficient_lm.elastic.nested import with_granularities
from efficient_lm.elastic.nesting import NestingSpec
from efficient_lm.elastic.search.base import SearchSpec
from efficient_lm.models.elastic import Axis

PAGE = (Path(__file__).parents[2] / "docs" / "elastic.md").read_text()


def test_commands_are_understood(shown_command, understood):
    assert understood(shown_command)


def test_what_is_extracted_is_inside_the_runs_that_the_page_trains(understood):
    """Of these runs the commands of the page, and the examples of the verb."""
    lines = [line for line in map(str.strip, (PAGE + HELP).splitlines()) if line.startswith("efficient-lm ")]
    commands = [shlex.split(line, comments=True)[1:] for line in lines]
    trained = [understood(command) for command in commands if command[0] == "train" and "=quickstart" in command[1]]
    models = {run.run.name: run.model.model_copy(update={"vocab_size": 32}).build() for run in trained}
    asked = [understood(command) for command in commands if command[0] == "extract"]
    seen = []
    for config in asked:
        name = Path(config.checkpoint).name
        if name in models:
            whole = models[name] if config.elastic is None else with_granularities(models[name], config.elastic)
            choose(whole, config.parts)
            trains_it = whole.spec.elastic is not None
            assert trains_it or not config.chooses_parts
            assert not (config.order and trains_it and config.parts.keys() & whole.spec.elastic.axes.keys())
            seen.append(name)
    assert set(models) == {"quickstart", "plain"} == set(seen) and len(seen) > 8


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
        named = set(re.findall(rf"(?<![./\w]){root}\.([a-z_]+)", PAGE))
        assert named and named <= set().union(*(kind.model_fields for kind in kinds)), root
