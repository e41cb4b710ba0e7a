"""The verb `generate`."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from efficient_lm.cli.main import Options
from efficient_lm.errors import DataError

if TYPE_CHECKING:
    from efficient_lm.api import Model

log = logging.getLogger(__name__)

ROOT = "generate"
SUMMARY = "Writes text with a model."
HELP = """
Main keys
  checkpoint=        a run directory (its newest checkpoint), runs/NAME/checkpoints/STEP, a Hugging Face folder, a GGUF
  prompt=            a text, or ['several','texts']
  prompt_file=       a file with one prompt per line, instead
  max_new_tokens=    per prompt
  temperature=       0 takes the likeliest token
  top_k= top_p= min_p=   restrict what is sampled
  seed=              of the sampling
  stop_at_end=       whether the end-of-text token ends a text
  submodel=          0.5: the smaller model inside with such a part of what it is trained to be smaller along;
                     submodel.ffn=0.5: of this
  averaged=true      the moving average that the run kept of its parameters (train.average)
  skipping=          which layers a token runs: uniform, confidence, ...; what that saved is said at the end
  draft=             0.25: such a smaller model inside drafts tokens, which the whole verifies: the same text, sooner;
                     [0.125,0.5]: several sizes; draft.layers=0.5: of this axis; what was accepted is said at the end
  draft_tokens=      drafted at a time
  draft_confidence=  probability below which a token is left to the next larger draft
  special_tokens=    whether <|im_start|> and the like in the prompt stand for those tokens

Examples
  efficient-lm generate checkpoint=runs/quickstart prompt='My fellow citizens, the state of'
  efficient-lm generate checkpoint=runs/quickstart prompt="['In peace','In war']" temperature=0
  efficient-lm generate checkpoint=runs/quickstart prompt='In war' skipping=uniform skipping.layers=4
  efficient-lm generate checkpoint=runs/nested prompt='In war' draft=0.25 draft_tokens=4
"""


def run(overrides: Sequence[str], flags: Options) -> None:
    """Generate as the config that `overrides` compose says: one text streams, several come when all are done."""
    from efficient_lm.composition import compose
    from efficient_lm.config import GenerateConfig
    from efficient_lm.validation import validate

    config = validate(GenerateConfig, compose(ROOT, overrides, flags.config_dirs).values)
    prompts = _prompts(config.prompt, config.prompt_file)

    from efficient_lm.api import load
    from efficient_lm.inference.sampling import SamplingSpec

    model = load(config.checkpoint, config.submodel, config.averaged).skip(config.skipping)
    if config.draft is not None:
        model = model.speculate(config.draft, config.draft_tokens, config.draft_confidence)
    sampling = SamplingSpec(**{name: getattr(config, name) for name in SamplingSpec.model_fields})
    options = (config.max_new_tokens, sampling, config.seed, config.stop_at_end, config.special_tokens)
    if len(prompts) > 1:
        texts = model.generate(prompts, *options)
        print("\n\n".join(prompt + text for prompt, text in zip(prompts, texts, strict=True)))
        _report(model)
        return
    # Before anything is printed: it says so if there is no tokenizer.
    model.tokenizer.encode("")
    print(prompts[0], end="", flush=True)
    for piece in model.stream_text(prompts[0], *options):
        print(piece, end="", flush=True)
    print()
    _report(model)


def _report(model: "Model") -> None:
    """What was computed, where that is not everything, or what became of drafts."""
    if model.decoder.report is not None:
        log.info("%s", model.decoder.report)


def _prompts(prompt: str | Sequence[str], path: str | None) -> list[str]:
    if path is None:
        return [prompt] if isinstance(prompt, str) else list(prompt)
    try:
        prompts = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompt_file: cannot read '{path}': {getattr(error, 'strerror', None) or error}") from error
    if not prompts:
        raise DataError(f"prompt_file: '{path}' is empty")
    return prompts
