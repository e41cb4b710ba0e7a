"""The verb `merge`."""

from collections.abc import Sequence
from pathlib import Path

from efficient_lm.cli.main import Options

ROOT = "merge"
SUMMARY = "Puts experts that were trained apart, around one backbone, into one model."
HELP = """
Main keys
  checkpoints=       [a,b,c]: run directories, the public one first; mixtures, dense models, or both
  output=            the run directory to make; it must not hold anything yet
  rows=              of routers: trained, or domains: the mean of what each run's validation data shows them
  bias=              added to the score of every expert but the first
  top_k=             experts that a token takes

Examples
  efficient-lm merge checkpoints=[runs/law,runs/code] output=runs/both
  efficient-lm merge checkpoints=[runs/public,runs/law,runs/code] output=runs/all rows=domains bias=-0.1
"""


def run(overrides: Sequence[str], options: Options) -> None:
    """Merge as the config that `overrides` compose says."""
    from efficient_lm.composition import compose
    from efficient_lm.upcycling.config import MergeConfig
    from efficient_lm.validation import validate

    config = validate(MergeConfig, compose(ROOT, overrides, options.config_dirs).values)

    from efficient_lm.api import load
    from efficient_lm.experts import merge
    from efficient_lm.interop.hugging_face import check_free
    from efficient_lm.made import save

    check_free(Path(config.output))
    models = {name: load(name) for name in config.checkpoints}
    made = merge(models, config.rows, config.top_k, config.bias, config.sequence_length, config.limit)
    print(save(made, config.output, ", ".join(config.checkpoints)))
