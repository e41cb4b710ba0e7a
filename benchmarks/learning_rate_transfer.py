"""Which learning rate is best at each width, with the standard parametrization and with muP.

    export PYTHONPATH=.                                          # where the package is not installed
    python benchmarks/learning_rate_transfer.py [--widths 32 64 128 256] [--steps 48] [--seeds 1]

A model of two layers learns the embedded corpus byte by byte, at every width with every rate of a grid of factors of
two, constant behind a short warm-up. What counts is the mean loss of the last sixth of the steps; the best rate lies
where a parabola through the three points about the smallest loss has its minimum. Writes
`docs/results/learning_rate_transfer.json` and `.png`, and prints a table.
"""

import argparse
import time
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.config import RunConfig, load_run_config
from efficient_lm.objectives.base import Batch
from efficient_lm.runtime import keep_compiled_programs, surroundings
from efficient_lm.training.portions import trained_on
from efficient_lm.training.reporting import empty_plot, save_plot, write_json_atomically
from efficient_lm.training.setup import Setup, prepare
from efficient_lm.training.step import State, initial_state, make_step

OUTPUT = Path(__file__).parent.parent / "docs" / "results" / "learning_rate_transfer"
ARMS = {"standard": [], "mup": ["parameterization=mup"]}
EXPONENTS = range(-10, -3)
"""Learning rates, as powers of two."""
WARMUP = 5
COLORS = ["#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860"]


def config(arm: str, width: int, options: argparse.Namespace) -> RunConfig:
    """The run of an arm at a width; its learning rate is not used."""
    model = [f"model.width={width}", "model.repeats=2", "mixer.head_size=16", "model.tied=false"]
    data = ["tokenizer=bytes", f"train.batch_size={options.batch}", f"train.sequence_length={options.time}"]
    base = [f"parameterization.base_width={options.widths[0]}"] if ARMS[arm] else []
    return load_run_config([*model, *data, f"train.steps={options.steps}", *ARMS[arm], *base])


def trainer(setup: Setup, steps: int) -> Any:
    """``(seed, rate, batches) -> losses [steps]``, compiled once for every rate."""
    build, declarations = setup.config.optimizer.build, setup.model.declarations

    @jax.jit
    def run(key: jax.Array, rate: jax.Array, batches: dict[str, jax.Array]) -> jax.Array:
        optimizer = build(lambda s: rate * jnp.minimum(1.0, (s + 1) / WARMUP), declarations, growths=setup.growths)
        step = make_step(setup.model, setup.config.objective, optimizer, clip_norm=setup.config.train.clip_norm)
        state = initial_state(setup.fresh_parameters(key), optimizer)

        def one(state: State, batch: Batch) -> tuple[State, jax.Array]:
            state, metrics = step(state, batch)
            return state, metrics["loss"]

        return jax.lax.scan(one, state, batches)[1]

    return run


def losses(setup: Setup, options: argparse.Namespace) -> list[float]:
    """The loss that each rate comes to, averaged over seeds; not a number where a run diverged."""
    found, run = [], trainer(setup, options.steps)
    batches = [trained_on(batch) for batch in islice(setup.portions.batches(setup.data), options.steps)]
    stacked = {name: jnp.stack([batch[name] for batch in batches]) for name in batches[0]}
    for exponent in EXPONENTS:
        ends = [
            float(np.mean(run(jax.random.key(seed), jnp.float32(2.0**exponent), stacked)[-(options.steps // 6) :]))
            for seed in range(options.seeds)
        ]
        found.append(float(np.mean(ends)))
    return found


def best(found: list[float]) -> float:
    """The exponent of the best rate, between those of the grid."""
    values = np.nan_to_num(np.asarray(found), nan=np.inf)
    least = int(np.argmin(values))
    if least in (0, len(values) - 1) or not np.isfinite(values[least - 1 : least + 2]).all():
        return float(EXPONENTS[least])
    left, middle, right = values[least - 1 : least + 2]
    return EXPONENTS[least] + float(0.5 * (left - right) / (left - 2 * middle + right))


def plot(results: dict[str, Any], widths: list[int]) -> None:
    """A panel for each arm: loss over rate, a curve for each width."""
    axes = empty_plot("log2 of the learning rate", "loss (nats per byte)", "standard: dashed, muP: solid")
    for arm, style in (("standard", "--"), ("mup", "-")):
        for width, color in zip(widths, COLORS, strict=False):
            found = results[arm][str(width)]
            label = f"width {width}" if arm == "mup" else None
            axes.plot(list(EXPONENTS), found["losses"], style, color=color, marker="o", markersize=3, label=label)
    low = min(min(found["losses"]) for arm in results.values() for found in arm.values())
    axes.set_ylim(low - 0.05, low + 1.2)
    axes.legend(frameon=False)
    save_plot(axes, OUTPUT.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    for name, default in (("steps", 48), ("seeds", 1), ("batch", 4), ("time", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    keep_compiled_programs()
    results: dict[str, Any] = {arm: {} for arm in ARMS}
    for arm in ARMS:
        for width in options.widths:
            began, found = time.monotonic(), losses(prepare(config(arm, width, options)), options)
            results[arm][str(width)] = {"losses": found, "best": best(found), "least": float(np.nanmin(found))}
            row = " ".join(f"{value:.3f}" for value in found)
            print(f"{arm:<9} {width:>4}  best 2^{best(found):.2f}  {row}  {time.monotonic() - began:.0f} s", flush=True)
    content = {**surroundings("jax", "optax"), "options": vars(options), "exponents": list(EXPONENTS)}
    write_json_atomically(OUTPUT.with_suffix(".json"), content | {"arms": results})
    plot(results, options.widths)


if __name__ == "__main__":
    main()
