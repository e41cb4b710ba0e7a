"""The verb `upcycle`."""

from collections.abc import Sequence
from pathlib import Path

from efficient_lm.cli.main import Options

ROOT = "upcycle"
SUMMARY = "Makes mixtures of experts of a dense model's channel mixers, or mixture of depths of its layers."
HELP = """
Main keys
  checkpoint=        a run directory, runs/NAME/checkpoints/STEP, a Hugging Face folder, a GGUF file
  output=            the run directory to make; it must not hold anything yet
  method=            copy: every expert a copy; split: the hidden units divided among experts; mixture_of_depths
  method.experts= method.top_k=   how many there are, and how many a token takes
  method.layers= method.every=    which layers; by default all dense ones
  method.share= method.rule.capacity=   of mixture_of_depths: how many layers, those of low rank; their share of tokens
  text=              files that the method looks at; with method.by=domains or method.rows=domains each is a domain
  limit= sequence_length=   rows of each file, and their tokens

Examples
  efficient-lm upcycle checkpoint=runs/quickstart output=runs/moe method.experts=8 method.top_k=2
  efficient-lm upcycle checkpoint=smollm2/ output=runs/split method=split method.experts=4 method.shared=0.25
  efficient-lm upcycle checkpoint=runs/public output=runs/law method.experts=2 method.rows=domains text=[a.txt,b.txt]
  efficient-lm upcycle checkpoint=runs/quickstart output=runs/mod method=mixture_of_depths method.share=0.5
  efficient-lm train init_from=runs/moe data=files data.source.paths=[text.txt]
"""


def run(overrides: Sequence[str], options: Options) -> None:
    """Upcycle as the config that `overrides` compose says."""
    from efficient_lm.composition import compose
    from efficient_lm.upcycling.config import UpcycleConfig
    from efficient_lm.validation import validate

    config = validate(UpcycleConfig, compose(ROOT, overrides, options.config_dirs).values)

    from efficient_lm.api import load
    from efficient_lm.experts import upcycle
    from efficient_lm.interop.hugging_face import check_free
    from efficient_lm.made import save

    check_free(Path(config.output))
    model = load(config.checkpoint)
    made = upcycle(model, config.method, config.text, config.sequence_length, config.limit, config.seed)
    print(save(made, config.output, config.checkpoint))
