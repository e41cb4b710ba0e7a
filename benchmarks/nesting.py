"""Training steps of a model with smaller ones inside, beside steps of each of them alone.

    export PYTHONPATH=.                                          # where the package is not installed
    python benchmarks/nesting.py                                 # MatFormer's four widths of a Llama of 8 layers
    python benchmarks/nesting.py --dtype bfloat16 --width 1024 --layers 16 --heads 16 --hidden 4096 \\
        --vocabulary 32768 --batch 16 --time 2048                # an accelerator

The arms take turns, a few steps each, for several rounds, so that what else the machine does meets all of them. What a
step costs is the mean over all steps of an arm: a strategy that draws costs something else in each. Arms: the whole
model and each one inside it trained alone, and every strategy.

`over_whole` is the time beside a plain step of the whole model, `over_parts` beside the plain steps of the models that
the strategy computes in a step: on average one for `sample` and `mixed`, all for `joint`; for `sandwich` the whole, the
smallest, one between, and a third of the whole once more, for what it says to the others. Needs jax, flax, optax and
pydantic.
"""

import argparse
import statistics
from typing import Any

from train_step import alternate, framework_arm, keep, make_batch, shapes

from efficient_lm.elastic.mixed import MixedSpec
from efficient_lm.elastic.nested import nested_models
from efficient_lm.elastic.nesting import JointSpec, NestingSpec, SampleSpec, SandwichSpec
from efficient_lm.models.elastic import MATFORMER
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.parameters import count_parameters

STRATEGIES: tuple[NestingSpec, ...] = (SampleSpec(), JointSpec(), SandwichSpec(), MixedSpec())


def model_spec(options: argparse.Namespace) -> ModelSpec:
    """A Llama with MatFormer's widths."""
    mixer, ffn = {"kind": "attention", "heads": options.heads}, {"kind": "swiglu", "hidden": options.hidden}
    return ModelSpec(
        width=options.width,
        blocks={"layer": {"mixer": mixer, "ffn": ffn}},
        layout=["layer"],
        repeats=options.layers,
        vocab_size=options.vocabulary,
        **({} if options.remat is None else {"remat": options.remat}),
        elastic=MATFORMER,
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step of every arm, and the ratios."""
    batch, spec = make_batch(options), model_spec(options)
    inside = nested_models(spec.build())
    arms = {f"alone {each.name}": framework_arm(each.model.spec, options, batch)[0] for each in inside}
    arms |= {nesting.kind: framework_arm(spec, options, batch, nesting)[0] for nesting in STRATEGIES}
    seconds = alternate(arms, options.rounds, options.steps)
    mean = {name: statistics.fmean(times) for name, times in seconds.items()}
    alone = [mean[f"alone {each.name}"] for each in inside]
    sums = {nesting.kind: nesting.cost(alone) for nesting in STRATEGIES}
    results = {}
    for name, times in seconds.items():
        results[name] = {"seconds_per_step": round(mean[name], 4), "over_whole": round(mean[name] / alone[-1], 3)}
        if name in sums:
            results[name]["over_parts"] = round(mean[name] / sums[name], 3)
        print(f"{name:12}", results[name], flush=True)
        results[name]["seconds"] = times
    return {"arms": results, "parameters": {each.name: count_parameters(each.model.declarations) for each in inside}}


def main() -> None:
    parser = shapes(__doc__)
    parser.set_defaults(rounds=8, steps=8)
    options = parser.parse_args()
    keep("nesting", options, measure(options))


if __name__ == "__main__":
    main()
