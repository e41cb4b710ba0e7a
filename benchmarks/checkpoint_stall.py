"""What a checkpoint costs the steps around it: the loop's wait, and how much longer steps take while it is written.

    export PYTHONPATH=.                                    # where the package is not installed
    python benchmarks/checkpoint_stall.py                  # a Llama of 100 M parameters: 1.2 GB of state with AdamW
    python benchmarks/checkpoint_stall.py --batch 32 --time 1024 --dtype bfloat16     # an accelerator

Rounds of a few steps without a save, then of a save and steps until all of it is on disk, checksums included, in one
process and with donated state as in training. In percent of a step without a save in the same round: `blocking` is the
call of `Checkpoints.save`; `stall` is that and what the first step after it takes longer; `worst` is the most that a
step takes longer while the save is written, the call counted with the first; `cost` is all that these steps take
longer, and `spread` that over their number. The first save of a process is shown by itself. Seconds are the wall's;
`processor` is the time of all threads, which other work disturbs less.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from train_step import framework_parts, framework_step, keep, make_batch, model_spec, shapes

from efficient_lm.models.parameters import count_parameters
from efficient_lm.training.checkpoints import Checkpoints
from efficient_lm.training.retention import Retention
from efficient_lm.training.step import initial_state


class Loop:
    """A donated state that steps one at a time, each timed on its own."""

    def __init__(self, options: argparse.Namespace):
        model = model_spec(options).build()
        optimizer, layout, shardings = framework_parts(model)
        self.parameters = count_parameters(model.declarations)
        start = jax.jit(lambda key: initial_state(model.init(key), optimizer), out_shardings=shardings)
        self.state, self.step = start(jax.random.key(0)), framework_step(model, options)
        self.batch = layout.batch(make_batch(options))
        self.timed()

    @property
    def bytes(self) -> int:
        """Of the state."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))

    def timed(self) -> tuple[float, float]:
        """Wall and processor seconds of a step."""
        wall, work = time.perf_counter(), time.process_time()
        self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - wall, time.process_time() - work

    def items(self) -> dict[str, Any]:
        """As a run saves them."""
        rest = {name: value for name, value in self.state.items() if name != "parameters"}
        return {"parameters": self.state["parameters"], "optimizer": rest}


def rounds(loop: Loop, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Of every round: (wall, processor) seconds of steps without a save, of the call, and of the steps after it."""
    checkpoints, found = Checkpoints(folder, Retention(1)), []
    checkpoints.prepare(loop.items())
    for number in range(options.rounds + 1):
        plain = [loop.timed() for _ in range(options.steps)]
        wall, work = time.perf_counter(), time.process_time()
        checkpoints.save(number, loop.items(), {"step": number}, going_on=True)
        saving = (time.perf_counter() - wall, time.process_time() - work)
        began, after = time.perf_counter(), []
        while checkpoints.writing:
            after.append(loop.timed())
        found.append({"plain": plain, "saving": saving, "after": after, "writing": time.perf_counter() - began})
        print(" ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
    checkpoints.close()
    return found


def summed(row: dict[str, Any], measure: int = 0) -> dict[str, float]:
    """The figures of one round, of the wall's seconds or of the processor's."""
    plain = statistics.median(step[measure] for step in row["plain"])
    blocking = 100 * row["saving"][measure] / plain
    each = [100 * (step[measure] / plain - 1) for step in row["after"]] or [0.0]
    each[0] += blocking
    return {
        "step_seconds": plain,
        "blocking_percent": blocking,
        "stall_percent": each[0],
        "worst_percent": max(each),
        "spread_percent": statistics.mean(each),
        "cost_percent": sum(each),
    }


def figures(found: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the rounds behind the first, and the first."""
    first, *rest = found

    def medians(measure: int) -> dict[str, float]:
        each = [summed(row, measure) for row in rest]
        return {name: statistics.median(row[name] for row in each) for name in each[0]}

    results = medians(0) | {f"processor_{name}": value for name, value in medians(1).items()}
    results["blocking_seconds"] = statistics.median(row["saving"][0] for row in rest)
    results["writing_seconds"] = statistics.median(row["writing"] for row in rest)
    results["writing_steps"] = statistics.median(len(row["after"]) for row in rest)
    results |= {f"first_{name}": value for name, value in summed(first).items() if name != "step_seconds"}
    return {name: round(value, 3) for name, value in results.items()}


def parse() -> argparse.Namespace:
    parser = shapes(__doc__, hidden=2048)
    parser.set_defaults(width=768, layers=12, heads=12, vocabulary=10240, batch=4, time=256, rounds=3, steps=3)
    parser.add_argument("--folder", type=Path, help="where checkpoints go for the time; default: the system's for such")
    options = parser.parse_args()
    options.architecture = "llama"
    return options


def main() -> None:
    options = parse()
    loop = Loop(options)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = rounds(loop, options, Path(folder))
    results = figures(found)
    results |= {"parameters": loop.parameters, "state_bytes": loop.bytes}
    results["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("  ".join(f"{name} {value}" for name, value in results.items()))
    keep(f"checkpoint_stall_w{options.width}_l{options.layers}", options, {**results, "rounds": found})


if __name__ == "__main__":
    main()
