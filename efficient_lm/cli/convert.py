"""The verb `convert`."""

from collections.abc import Sequence
from pathlib import Path

from efficient_lm.cli.main import Options

ROOT = "convert"
SUMMARY = "Turns published models (Hugging Face, GGUF) into run directories, and runs into Hugging Face folders."
HELP = """
Main keys
  source=            a Hugging Face folder, a GGUF file, a run directory, or runs/NAME/checkpoints/STEP
  output=            the folder to make; it must not hold anything yet
  format=            run or hf; by default the other kind
  dtype=             for hf: float32, bfloat16 or float16 to round to; by default nothing is rounded

Examples
  efficient-lm convert source=smollm2/ output=runs/smollm2
  efficient-lm convert source=model.gguf output=model-hf format=hf dtype=bfloat16
  efficient-lm convert source=runs/quickstart output=quickstart-hf
"""


def run(overrides: Sequence[str], options: Options) -> None:
    """Convert as the config that `overrides` compose says."""
    from efficient_lm.composition import compose
    from efficient_lm.config import ConvertConfig
    from efficient_lm.validation import validate

    config = validate(ConvertConfig, compose(ROOT, overrides, options.config_dirs).values)

    from efficient_lm.api import load
    from efficient_lm.data.tokenizers import AbsentTokenizer
    from efficient_lm.errors import ConfigError
    from efficient_lm.interop.hugging_face import check_free
    from efficient_lm.interop.sources import is_published
    from efficient_lm.models.parameters import count_parameters

    form = config.format or ("run" if is_published(Path(config.source)) else "hf")
    if form == "run" and config.dtype is not None:
        raise ConfigError("dtype: a run directory holds float32; leave it out, or write format=hf")
    # Before the tensors are read: that may take minutes.
    check_free(Path(config.output))
    model = load(config.source)
    path = model.save(config.output) if form == "run" else model.to_hf(config.output, config.dtype)
    count = count_parameters(model.model.declarations)
    tied = ", tied" if model.config.model.tied else ""
    print(f"{config.source}: {count / 1e6:,.1f} M parameters{tied} → {path}")
    if not isinstance(model.tokenizer, AbsentTokenizer):
        print(f"next:\n  efficient-lm evaluate checkpoint={path}\n  efficient-lm train init_from={path}")
