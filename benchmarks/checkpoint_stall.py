"""What a checkpoint costs the steps around it: the loop's wait, and how much longer steps take while it is written.

    export PYTHONPATH=.                                    # where the package is not installed
    python benchmarks/checkpoint_stall.py                  # a Llama of 100 M parameters: 1.2 GB of state with AdamW
    python benchmarks/checkpoint_stall.py --batch 32 --time 1024 --dtype bfloat16     # an accelerator

Rounds of a few steps without a save, then of a save and as many steps, in one process and with donated state as in
training. `blocking` is the call of `Checkpoints.save`; `stall` is that and what the step after it takes longer than a
step without a save, over such a step; `cost` is the same of all steps until everything is on disk, checksums included.
Seconds are the wall's; `processor` is the time of all threads, which a shared machine disturbs less.
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
    for number in range(1, options.rounds + 1):
        plain = [loop.timed() for _ in range(options.steps)]
        wall, work = time.perf_counter(), time.process_time()
        checkpoints.save(number, loop.items(), {"step": number})
        saving = (time.perf_counter() - wall, time.process_time() - work)
        after = [loop.timed() for _ in range(options.steps)]
        left = time.perf_counter()
        checkpoints.wait()
        left = time.perf_counter() - left
        found.append({"plain": plain, "saving": saving, "after": after, "left_seconds": left})
        print(" ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
    checkpoints.close()
    return found


def figures(found: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the rounds; percentages are of a step without a save in the same round."""

    def over(measure: int, steps: slice) -> list[float]:
        each = []
        for row in found:
            plain = statistics.median(step[measure] for step in row["plain"])
            excess = sum(step[measure] - plain for step in row["after"][steps])
            each.append(100 * (row["saving"][measure] + excess) / plain)
        return each

    plain = [step for row in found for step in row["plain"]]
    results = {
        "step_seconds": statistics.median(wall for wall, _ in plain),
        "blocking_seconds": statistics.median(row["saving"][0] for row in found),
        "left_seconds": statistics.median(row["left_seconds"] for row in found),
        "blocking_percent": statistics.median(
            100 * row["saving"][0] / statistics.median(wall for wall, _ in row["plain"]) for row in found
        ),
        "stall_percent": statistics.median(over(0, slice(1))),
        "cost_percent": statistics.median(over(0, slice(None))),
        "processor_stall_percent": statistics.median(over(1, slice(1))),
        "processor_cost_percent": statistics.median(over(1, slice(None))),
    }
    return {name: round(value, 3) for name, value in results.items()}


def parse() -> argparse.Namespace:
    parser = shapes(__doc__, hidden=2048)
    parser.set_defaults(width=768, layers=12, heads=12, vocabulary=10240, batch=4, time=256, rounds=3, steps=2)
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
