"""The verb `schema`."""

import json
from collections.abc import Sequence

from efficient_lm.cli.main import Options
from efficient_lm.errors import ConfigError

ROOT = None
SUMMARY = "Prints a JSON Schema of training configs, with which editors complete and check YAML."
HELP = """
Examples
  efficient-lm schema > efficient-lm.schema.json
  then, as first line of an experiment:  # yaml-language-server: $schema=../../efficient-lm.schema.json
"""


def run(overrides: Sequence[str], options: Options) -> None:
    """Print the schema."""
    if overrides:
        raise ConfigError(f"{overrides[0]}: schema takes no key")
    from efficient_lm.config import json_schema

    print(json.dumps(json_schema(), indent=2))
