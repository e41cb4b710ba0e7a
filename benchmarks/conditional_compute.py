"""Training steps of models that compute for each token what it is given, beside a dense model.

    export PYTHONPATH=.                                          # where the package is not installed
    python benchmarks/conditional_compute.py experts             # beside a dense model of equal active parameters
    python benchmarks/conditional_compute.py depth               # one token in eight runs every other block
    python benchmarks/conditional_compute.py memory              # of a gradient, by the number of experts

    ... --dtype bfloat16 --width 1024 --layers 16 --heads 16 --hidden 2816 --vocabulary 32768 --batch 16 --time 2048

`experts` and `depth` alternate their arms, a few steps each, for several rounds, so that what else the machine does
meets both; ratios are of times in the same round. `memory` compiles the gradient of models whose tokens take two
experts of one size, of ever more experts, and reads what the compiler says it needs besides parameters and gradients.
Needs jax, flax, optax and pydantic.
"""

import argparse
import statistics
from typing import Any

import jax
from train_step import alternate, framework_arm, keep, make_batch, ratio, shapes

from efficient_lm.models.language_model import LanguageModel, ModelSpec
from efficient_lm.models.parameters import Parameters, count_parameters
from efficient_lm.objectives.base import Batch
from efficient_lm.objectives.causal_lm import CausalLMSpec

TOP_K, EXPERTS, CAPACITY = 2, 8, 0.125
COUNTS = (4, 8, 16, 32, 64)


def spec_of(options: argparse.Namespace, blocks: dict[str, Any]) -> ModelSpec:
    """`options.layers` layers, the blocks in turn."""
    attention = {"kind": "attention", "heads": options.heads}
    return ModelSpec(
        width=options.width,
        blocks={name: {"mixer": attention, **block} for name, block in blocks.items()},
        layout=list(blocks),
        repeats=options.layers // len(blocks),
        vocab_size=options.vocabulary,
        **({} if options.remat is None else {"remat": options.remat}),
    )


def dense(options: argparse.Namespace) -> dict[str, Any]:
    """The channel mixer of the dense model."""
    return {"kind": "swiglu", "hidden": options.hidden}


def experts(options: argparse.Namespace, count: int = EXPERTS) -> dict[str, Any]:
    """Experts of which a token takes two, together as large as the dense channel mixer."""
    return {
        "kind": "moe",
        "experts": count,
        "top_k": TOP_K,
        "expert": {"kind": "swiglu", "hidden": options.hidden // TOP_K},
        "balance": {"load_balance": 0.01},
    }


def arms_of(options: argparse.Namespace) -> dict[str, ModelSpec]:
    """The models of a comparison."""
    whole = {"whole": {"ffn": dense(options)}}
    if options.what == "experts":
        return {
            "dense": spec_of(options, whole),
            "experts": spec_of(options, {"layer": {"ffn": experts(options)}}),
        }
    rule = {"kind": "mixture_of_depths", "capacity": CAPACITY}
    some = {"some": {"ffn": dense(options), "depth": rule}}
    return {"dense": spec_of(options, whole), "depth": spec_of(options, whole | some)}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of both arms, and the ratio of their times."""
    batch = make_batch(options)
    specs = arms_of(options)
    arms = {name: framework_arm(spec, options, batch)[0] for name, spec in specs.items()}
    seconds = alternate(arms, options.rounds, options.steps)
    results = {}
    for name, times in seconds.items():
        model = specs[name].build()
        results[name] = {
            "tokens_per_second": round(options.batch * options.time / statistics.median(times), 1),
            "time_over_dense": ratio(seconds, name, "dense"),
            "parameters": count_parameters(model.declarations),
            "forward_flops_per_token": model.flops_per_token(options.time),
            "seconds": times,
        }
        print(name, {key: value for key, value in results[name].items() if key != "seconds"}, flush=True)
    return {"arms": results}


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes that the gradient of a batch needs besides parameters and gradients, by the number of experts."""
    batch = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in make_batch(options).items()}
    found = {}
    for count in COUNTS:
        model = spec_of(options, {"layer": {"ffn": experts(options, count)}}).build()

        def loss(params: Parameters, batch: Batch, model: LanguageModel = model) -> jax.Array:
            return CausalLMSpec().sums(model, params, batch, options.dtype, packed=bool(options.document)).loss

        params = jax.eval_shape(model.init, jax.random.key(0))
        analysis = jax.jit(jax.grad(loss)).lower(params, batch).compile().memory_analysis()
        layers = count_parameters(model.stack.declarations)
        found[count] = {"workspace": analysis.temp_size_in_bytes, "one_layer": 4 * layers // options.layers}
        print(f"{count} experts", found[count], flush=True)
    return {"bytes_by_experts": found}


def parse() -> argparse.Namespace:
    parser = shapes(__doc__, document=0)
    parser.add_argument("what", choices=("experts", "depth", "memory"))
    return parser.parse_args()


def main() -> None:
    options = parse()
    results = memory(options) if options.what == "memory" else compare(options)
    keep(f"conditional_{options.what}", options, results)


if __name__ == "__main__":
    main()
