"""Pages and their commands: each is composed and validated as if it were typed."""

import re
import shlex

import pytest

from efficient_lm.composition import compose
from efficient_lm.config import ConvertConfig, EvaluateConfig, GenerateConfig, PlanConfig, RunConfig
from efficient_lm.sweeps.report.spec import ReportConfig
from efficient_lm.upcycling.config import ExtractConfig, MergeConfig, UpcycleConfig
from efficient_lm.validation import validate

CONFIGS = {
    "train": RunConfig, "plan": RunConfig, "evaluate": EvaluateConfig, "generate": GenerateConfig,
    "upcycle": UpcycleConfig, "merge": MergeConfig, "extract": ExtractConfig,
    "convert": ConvertConfig, "report": ReportConfig,
}  # fmt: skip


def pytest_generate_tests(metafunc):
    """A test that takes a `shown_command` runs for each of the module's PAGE: a verb and its keys."""
    if "shown_command" in metafunc.fixturenames:
        blocks = "\n".join(re.findall(r"```sh\n(.*?)```", metafunc.module.PAGE, re.DOTALL)).replace("\\\n", " ")
        lines = [line for line in blocks.splitlines() if line.startswith("efficient-lm")]
        commands = [shlex.split(line, comments=True)[1:] for line in lines]
        metafunc.parametrize("shown_command", commands, ids=[" ".join(command) for command in commands])


@pytest.fixture
def understood():
    """``understood(command, from_run=[])`` → its config; keys that a run to begin with would bring are `from_run`."""

    def config(command, from_run=()):
        verb, *keys = command
        # A run to begin with is not there.
        typed = [key for key in keys if not key.startswith("init_from=")]
        typed += from_run if len(typed) < len(keys) else []
        # Nor are the text and the tokenizer that a plan does without.
        typed += ["data.source.paths=[text]", "tokenizer.path=tokenizer.json"] if verb == "plan" else []
        values = compose(verb, typed).values
        if verb == "plan":
            validate(PlanConfig, {key: values.pop(key) for key in PlanConfig.model_fields})
        return validate(CONFIGS[verb], values)

    return config


@pytest.fixture
def table():
    """``table(page, word)`` → the cells of the page's table that has this word, line by line, without its heading."""

    def cells(page, word):
        found = next(lines for lines in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE) if f"`{word}`" in lines)
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines()[2:]]

    return cells
