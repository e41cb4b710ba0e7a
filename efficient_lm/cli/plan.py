"""The verb `plan`."""

from collections.abc import Sequence

from efficient_lm.cli.main import Options

ROOT = "plan"
SUMMARY = "Counts parameters, FLOPs and memory of a training config, without allocating anything."
HELP = """
Takes every key of `train`.

Examples
  efficient-lm plan experiment=transformer_350m
  efficient-lm plan model.width=1024 model.repeats=24 mixer.heads=16 train.sequence_length=2048
"""


def run(overrides: Sequence[str], options: Options) -> None:
    """Count what the config that `overrides` compose would cost."""
    from efficient_lm.config import load_run_config

    load_run_config(overrides, options.config_dirs, ROOT)
