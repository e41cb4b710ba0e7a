"""The verb `generate`."""

from collections.abc import Sequence

from efficient_lm.cli.main import Options

ROOT = "generate"
SUMMARY = "Writes text with a model."
HELP = """
Main keys
  checkpoint=        a run directory (its newest checkpoint), or runs/NAME/checkpoints/STEP
  prompt=            a text, or ['several','texts']
  prompt_file=       a file with one prompt per line, instead
  max_new_tokens=    per prompt
  temperature=       0 takes the likeliest token
  top_k= top_p= min_p=   restrict what is sampled
  seed=              of the sampling
  stop_at_end=       whether the end-of-text token ends a text

Examples
  efficient-lm generate checkpoint=runs/quickstart prompt='My fellow citizens, the state of'
  efficient-lm generate checkpoint=runs/quickstart prompt="['In peace','In war']" temperature=0
"""


def run(overrides: Sequence[str], options: Options) -> None:
    """Generate as the config that `overrides` compose says."""
    from efficient_lm.composition import compose
    from efficient_lm.config import GenerateConfig
    from efficient_lm.validation import validate

    validate(GenerateConfig, compose(ROOT, overrides, options.config_dirs).values)
