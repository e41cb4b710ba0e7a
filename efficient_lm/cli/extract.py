"""The verb `extract`."""

from collections.abc import Sequence
from pathlib import Path

from efficient_lm.cli.main import Options

ROOT = "extract"
SUMMARY = "Makes a smaller model of a part of another: narrower, with fewer heads, layers or experts."
HELP = """
Main keys
  checkpoint=        a run directory, runs/NAME/checkpoints/STEP, a Hugging Face folder, a GGUF file
  output=            the run directory to make; it must not hold anything yet
  averaged=true      of the moving average that the run kept of its parameters (train.average)
  ffn= heads= state= rank=   0.5: such a part of hidden units, heads, recurrent state, bottlenecks;
                     [1,0.5,...]: one for each layer; ffn.BLOCK=0.5: in the layers of a block
  width=             such a part of the residual stream
  layers=            0.5: such a part of the layers; [0,1,3]: these
  order=             which units and layers a part keeps: activation (what the output map reads of a unit; of
                     layers, how much they change the stream), gradient, weight, none (the first); by default
                     the first of what the model is trained to be smaller along, and activation along others
  experts=           0.5: such a part of each layer's; 4: so many of the most important; [0,2]: these;
                     [[0,2],[1,3]]: these of each layer with experts
  by=                what a number keeps: reconstruction (the layer's error without an expert), weight, load
  uneven=true        layers may keep different numbers, so many on average
  drop_super_experts=true   Super Experts may go too
  top_k=             experts that a token takes from then on
  budget.params= budget.flops_per_token= budget.cache_bytes= budget.latency_ms=   in place of parts: the best
                     submodel that has no more of it
  search=            how it is looked for: mix_n_match, dynamic_programming, evolution; by default the largest is taken.
                     Without a budget a table of the best of each size is all that is made
  elastic.ffn= elastic.heads= ...   of a model that was not trained for any: [0.25,0.5,1], parts to choose among, its
                     units put in order as order= says; MatFormer's of ffn where only order= is given
  text= limit=       files, and rows of these, on which is measured; by default the run's validation data

Examples
  efficient-lm extract checkpoint=runs/nested output=runs/half ffn=0.5
  efficient-lm extract checkpoint=runs/nested output=runs/uneven ffn=[0.25,0.5,0.5,1] layers=[0,1,3]
  efficient-lm extract checkpoint=runs/plain output=runs/pruned ffn=0.5 layers=0.5 order=activation
  efficient-lm extract checkpoint=runs/both output=runs/without_code experts=[0,1]
  efficient-lm extract checkpoint=runs/moe_tiny output=runs/half experts=4 by=weight
  efficient-lm extract checkpoint=runs/nested output=runs/small budget.params=12e6 search=evolution
  efficient-lm extract checkpoint=runs/plain output=runs/small budget.params=3e6 elastic.ffn=[0.25,0.5,0.75,1]
"""


def run(overrides: Sequence[str], options: Options) -> None:
    """Extract as the config that `overrides` compose says."""
    from efficient_lm.composition import compose
    from efficient_lm.upcycling.config import ExtractConfig
    from efficient_lm.validation import validate

    config = validate(ExtractConfig, compose(ROOT, overrides, options.config_dirs).values)

    from efficient_lm.api import load
    from efficient_lm.experts import extract
    from efficient_lm.interop.hugging_face import check_free
    from efficient_lm.made import save
    from efficient_lm.search import search, within

    check_free(Path(config.output))
    model = made = load(config.checkpoint, averaged=config.averaged)
    measured = {"text": config.text, "sequence_length": config.sequence_length, "rows": config.limit}
    chosen = {"elastic": config.elastic, "order": config.order}
    if config.search is not None:
        found = search(model, config.search, config.output, config.budget, **measured, **chosen)
        print(found)
        if found.chosen is None:
            return
        made = found.model
    elif config.budget is not None:
        made = within(model, config.budget, **measured, **chosen)
    if config.chooses_experts:
        spared = not config.drop_super_experts
        made = extract(made, config.experts, config.by, config.uneven, spared, config.top_k, **measured)
    if config.parts:
        made = made.extract(**config.parts, order=config.order, **measured)
    print(save(made, config.output, config.checkpoint, model))
