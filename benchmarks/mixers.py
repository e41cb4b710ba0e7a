"""Time and memory of sequence mixers against length, and the time of a decoded token against its position.

    export PYTHONPATH=.                                     # where the package is not installed
    python benchmarks/mixers.py                             # one layer of each kind, 512 to 16,384 tokens
    python benchmarks/mixers.py --decode                    # a token after 64, 1,024 and 8,192 others
    python benchmarks/mixers.py --kinds mamba2 attention --width 1024 --dtype bfloat16

Each mixer has its default options. A row of the first table is one gradient step through one layer on one sequence:
median seconds, and the temporary memory that the compiled program asks for. The exponent says how they grow between
the two longest rows: 1 is linear, 2 quadratic. Needs jax, flax and pydantic.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from timing import surroundings

import efficient_lm.models.block  # noqa: F401  (registers every kind)
from efficient_lm.models.context import Context
from efficient_lm.models.mixers.base import MixerSpec
from efficient_lm.models.parameters import Blueprint, Initialization

HERE = Path(__file__).parent
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
POSITIONS = (64, 1024, 8192)
TOKENS = 32
"""Decoded in a row for one measurement."""


def blueprint_of(kind: str, width: int) -> Blueprint:
    """One mixer with its default options."""
    return Blueprint(lambda: MixerSpec.kinds[kind]().resolved(width).build(width, Initialization()))


def median_seconds(run: Any, rounds: int) -> float:
    """Median over rounds of the seconds that ``run()`` takes, after one round more."""
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def by_length(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and temporary bytes of a gradient step at each length, and how they grow."""
    blueprint = blueprint_of(kind, options.width)
    params = jax.jit(blueprint.init)(jax.random.key(0))

    def loss(params: Any, x: jax.Array) -> jax.Array:
        y, _ = blueprint(params)(x, Context.rows(*x.shape[:2]))
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    rows: dict[int, dict[str, float]] = {}
    for length in options.lengths:
        x = jax.random.normal(jax.random.key(1), (options.batch, length, options.width), options.dtype)
        step = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()
        seconds = median_seconds(lambda step=step, x=x: step(params, x), options.rounds)
        rows[length] = {"seconds": seconds, "temporary_bytes": step.memory_analysis().temp_size_in_bytes}
    *_, before, last = options.lengths
    growth = {
        name: round(math.log(rows[last][name] / rows[before][name]) / math.log(last / before), 2)
        for name in ("seconds", "temporary_bytes")
    }
    times = " ".join(f"{1e3 * row['seconds']:9.1f}" for row in rows.values())
    sizes = " ".join(f"{row['temporary_bytes'] / 2**20:8.1f}" for row in rows.values())
    print(f"{kind:24}{times}   {growth['seconds']:5.2f} |{sizes}   {growth['temporary_bytes']:5.2f}", flush=True)
    return {"by_length": rows, "exponents": growth}


def by_position(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per decoded token, one sequence, after so many tokens."""
    blueprint = blueprint_of(kind, options.width)
    params = jax.jit(blueprint.init)(jax.random.key(0))

    @jax.jit
    def prefill(params: Any, x: jax.Array, cache: Any) -> Any:
        index = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        return blueprint(params)(x, Context(index, jnp.ones_like(index), "prefill"), cache)[1]

    @jax.jit
    def step(params: Any, x: jax.Array, position: jax.Array, cache: Any) -> Any:
        context = Context(position[None, None], jnp.ones((1, 1), jnp.int32), "decode")
        return blueprint(params)(x, context, cache)

    rows: dict[int, float] = {}
    one = jax.random.normal(jax.random.key(2), (1, 1, options.width), options.dtype)
    for position in options.positions:
        empty = blueprint(params).init_cache(1, position + TOKENS, options.dtype)
        x = jax.random.normal(jax.random.key(1), (1, position, options.width), options.dtype)
        start = prefill(params, x, empty)

        def run(start: Any = start, position: int = position) -> Any:
            cache = start
            for index in range(TOKENS):
                y, cache = step(params, one, jnp.int32(position + index), cache)
            return y, cache

        rows[position] = median_seconds(run, options.rounds) / TOKENS
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(start))
    print(f"{kind:24}" + " ".join(f"{1e6 * seconds:10.0f}" for seconds in rows.values()) + f"{size:12,}", flush=True)
    return {"seconds_by_position": rows, "cache_bytes": size, "last_over_first": rows[max(rows)] / rows[min(rows)]}


def parse() -> argparse.Namespace:
    kinds = [kind for kind, found in MixerSpec.kinds.items() if not found.bidirectional]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=sorted(set(kinds) - {"parallel"}), metavar="KIND")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--positions", type=int, nargs="+", default=POSITIONS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--decode", action="store_true", help="time of a decoded token by its position instead")
    parser.add_argument("--output", type=Path, help="file of the results; default: by device in results/")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.decode:
        print(f"{'microseconds at':24}" + " ".join(f"{n:>10}" for n in options.positions) + f"{'cache bytes':>12}")
    else:
        print(f"{'milliseconds | MiB':24}" + " ".join(f"{n:>9}" for n in options.lengths) + "   grows")
    measure = by_position if options.decode else by_length
    results = {kind: measure(kind, options) for kind in options.kinds}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    what = "mixers_decode" if options.decode else "mixers_length"
    output = options.output or HERE / "results" / f"{what}_{jax.default_backend()}_{options.dtype}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    facts = {**surroundings("jax", "jaxlib", "flax"), "settings": settings, "results": results}
    output.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"kept in {output}")


if __name__ == "__main__":
    main()
