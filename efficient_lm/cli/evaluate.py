"""The verb `evaluate`."""

from collections.abc import Sequence

from efficient_lm.cli.main import Options

ROOT = "evaluate"
SUMMARY = "Measures a model's bits per byte on held-out data or on any text."
HELP = """
Main keys
  checkpoint=        a run directory (its newest checkpoint), or runs/NAME/checkpoints/STEP
  text=              a file, or [several]: .txt, .jsonl (also .gz, .xz, .zst), .parquet
  data= data.KEY=    other data, of which the validation part is read; without either, the run's own
  sequence_length=   tokens per row; by default as in training
  batch_size=        rows at a time

Examples
  efficient-lm evaluate checkpoint=runs/quickstart
  efficient-lm evaluate checkpoint=runs/quickstart text=[speech.txt,letters.jsonl.gz]
"""


def run(overrides: Sequence[str], options: Options) -> None:
    """Evaluate as the config that `overrides` compose says."""
    from efficient_lm.composition import compose
    from efficient_lm.config import EvaluateConfig
    from efficient_lm.validation import validate

    config = validate(EvaluateConfig, compose(ROOT, overrides, options.config_dirs).values)

    from efficient_lm.api import load

    model = load(config.checkpoint)
    paths = (config.text,) if isinstance(config.text, str) else config.text
    scores = model.evaluate(paths or config.data, config.sequence_length, config.batch_size)
    length = config.sequence_length or model.config.train.sequence_length
    print(f"{config.checkpoint}, step {model.step}: rows of {length} tokens, documents apart")
    for name, value in scores.items():
        print(
            f"  {name.replace('_', ' '):<14} {value:,}"
            if isinstance(value, int)
            else f"  {name.replace('_', ' '):<14} {value:.4f}"
        )
