"""Text that a smaller model inside drafts and the whole verifies, beside text that the whole makes token by token.

    export PYTHONPATH=.                                          # where the package is not installed
    python benchmarks/speculative.py --checkpoint runs/nested    # drafts of a model that was trained for them
    python benchmarks/speculative.py                             # of a wide one, right as often as it is made so
    python benchmarks/speculative.py --mixer mamba2              # whose states do not forget rejected tokens

The arms take turns for several rounds, one prompt at a time, so that what else the machine does meets all of them;
`ratio` is the median, over rounds, of the time of plain decoding by that of the arm: above 1, drafting is sooner;
`processor_ratio` that of processor time, all cores added, which others' work disturbs least. `acceptance_rate` and
`tokens_per_verification` say how right drafts were, `draft_flops` what a drafted token costs of one of the whole.
Programs are compiled before.

Without a checkpoint the model has parameters as they are drawn, of a width at which channel mixers are most of what a
token costs. The output of the hidden units that the draft leaves out is scaled by each of `--rest`: the more
there is of them, the fewer drafts are right. Needs jax, flax, optax and pydantic.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from train_step import keep

from efficient_lm.api import load
from efficient_lm.elastic.choices import choose
from efficient_lm.elastic.submodels import submodel_parameters, submodel_spec
from efficient_lm.inference.decoding import Decoder
from efficient_lm.inference.sampling import SamplingSpec
from efficient_lm.inference.speculative import SpeculativeDecoder
from efficient_lm.models.language_model import LanguageModel, ModelSpec
from efficient_lm.models.parameters import Parameters

PROMPTS = ("In war, ", "The people of the United States", "I recommend")
CONTEXT = 128
"""Tokens of the sequence that FLOPs are counted for."""


def wide(options: argparse.Namespace) -> LanguageModel:
    """A Llama, or the same with another mixer, whose channel mixers are eight times as wide as its stream."""
    mixer = {"kind": options.mixer, "heads": options.heads}
    block = {"mixer": mixer, "ffn": {"kind": "swiglu", "hidden": options.hidden}}
    return ModelSpec(
        width=options.width, blocks={"layer": block}, layout=["layer"], repeats=options.layers,
        vocab_size=options.vocabulary, tied=False,
    ).build()  # fmt: skip


def weakened(params: Parameters, kept: int, rest: float) -> Parameters:
    """With the output of all hidden units but the first scaled by `rest`."""

    def scaled(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        of_units = [getattr(step, "key", None) for step in path[-2:]] == ["down", "weight"]
        return leaf.at[:, kept:].multiply(rest) if of_units else leaf

    return jax.tree.map_with_path(scaled, params)


def draft_of(model: LanguageModel, params: Parameters, part: float) -> tuple[LanguageModel, Parameters]:
    """The model inside with such a part of the hidden units."""
    choice = choose(model, {"ffn": part})
    small = submodel_spec(model, choice).build()
    return small, jax.jit(lambda params: submodel_parameters(model, small, params, choice.layers))(params)


def race(
    model: LanguageModel,
    params: Parameters,
    prompts: Sequence[np.ndarray],
    options: argparse.Namespace,
    temperature: float,
) -> list[dict[str, Any]]:
    """A row for plain decoding, and for every draft and number of tokens it drafts at a time."""
    sampling, whole = SamplingSpec(temperature=temperature), model.flops_per_token(CONTEXT)
    arms: list[tuple[dict[str, Any], Decoder]] = [({"draft": None}, Decoder(model, params, options.dtype))]
    for part in options.drafts:
        small, values = draft_of(model, params, part)
        about = {"draft": part, "draft_flops": round(small.flops_per_token(CONTEXT) / whole, 3)}
        for count in options.tokens:
            decoder = SpeculativeDecoder(model, params, [(small, values)], options.dtype, count)
            arms.append((about | {"draft_tokens": count}, decoder))
    taken: list[list[tuple[float, float]]] = [[] for _ in arms]
    reports: list[list[dict[str, Any]]] = [[] for _ in arms]
    for turn in range(options.rounds + 1):
        for place, (_, decoder) in enumerate(arms):
            began, worked = time.perf_counter(), time.process_time()
            for prompt in prompts:
                list(decoder.stream([prompt], options.new, sampling, seed=turn))
                if decoder.report is not None:
                    reports[place].append(decoder.report.figures())
            per_token = 1e3 / (len(prompts) * options.new)
            if turn:  # Programs are compiled in the first.
                times = time.perf_counter() - began, time.process_time() - worked
                taken[place].append(tuple(round(per_token * seconds, 3) for seconds in times))
    return [
        {"temperature": temperature, **about, **_figures(times, taken[0], found)}
        for (about, _), times, found in zip(arms, taken, reports, strict=True)
    ]


def _figures(
    times: list[tuple[float, float]], plain: list[tuple[float, float]], reports: list[dict[str, Any]]
) -> dict[str, Any]:
    ratios = [
        statistics.median(first[kind] / mine[kind] for first, mine in zip(plain, times, strict=True)) for kind in (0, 1)
    ]
    found = {
        name: round(statistics.fmean(report[name] for report in reports), 3)
        for name in ("acceptance_rate", "tokens_per_verification")
        if reports
    }
    wall, processor = (round(statistics.median(kind), 3) for kind in zip(*times, strict=True))
    return {
        "ms_per_token": wall, "processor_ms_per_token": processor, "ratio": round(ratios[0], 3),
        "processor_ratio": round(ratios[1], 3), **found, "ms": [wall for wall, _ in times],
    }  # fmt: skip


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of every model, temperature and draft."""
    rows = []
    if options.checkpoint is not None:
        model = load(options.checkpoint)
        prompts = [np.asarray(model.tokenizer.encode(prompt), np.int32) for prompt in PROMPTS]
        for temperature in options.temperatures:
            rows += race(model.model, model.params, prompts, options, temperature)
    else:
        model, drawn = wide(options), np.random.default_rng(0).integers(0, options.vocabulary, (1, 8))
        params = jax.jit(model.init)(jax.random.key(0))
        kept = round(max(options.drafts) * options.hidden)
        for rest in options.rest:
            found = race(model, weakened(params, kept, rest), list(drawn.astype(np.int32)), options, 0.0)
            rows += [{"rest": rest, **row} for row in found]
    for row in rows:
        print({name: value for name, value in row.items() if name != "ms"}, flush=True)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="a run with smaller models inside")
    parser.add_argument("--drafts", type=float, nargs="+", default=[0.125], help="parts of the hidden units")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4], help="drafted at a time")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8], help="of a checkpoint")
    parser.add_argument("--rest", type=float, nargs="+", default=[0.1, 0.2, 0.3], help="without a checkpoint")
    parser.add_argument("--mixer", default="attention", help="without a checkpoint, a kind that has heads")
    sizes = {"width": 384, "layers": 6, "heads": 6, "hidden": 3072, "vocabulary": 4096, "new": 64, "rounds": 5}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path, help="file of the results; default: by device in results/")
    return parser.parse_args()


def main() -> None:
    options = parse()
    rows = measure(options)
    made = "wide" if options.mixer == "attention" else f"wide_{options.mixer}"
    of = made if options.checkpoint is None else Path(options.checkpoint).name
    keep(f"speculative_{of}", options, {"rows": rows}, checkpoint=of)


if __name__ == "__main__":
    main()
