"""What a run costs around its steps: dispatch, waiting for data, reading and logging metrics, checkpoints.

    python benchmarks/loop.py                        # a Llama of 8 layers in float32, on the embedded corpus
    python benchmarks/loop.py --dtype bfloat16 --width 768 --layers 12 --heads 12 --hidden 2048 --batch 32 --time 2048

Two arms take turns, a few steps each, and ratios are of times in the same round: ``step`` is the compiled step alone,
with a batch that is on the device; ``loop`` is what a run does for a step (see `efficient_lm.training.loop`), with the
next batch made each time and a row of metrics logged at every tenth step, to a file and to TensorBoard. A checkpoint's
stall is the time that saving holds up the run, beside the time of a step; what the disk does behind the run's back is
in the step after it. Needs the whole package, as it is installed for training.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from train_step import Round, alternate, keep, ratio, shapes

from efficient_lm.config import RunConfig, load_run_config
from efficient_lm.models.parameters import count_parameters
from efficient_lm.training.checkpoints import Checkpoints
from efficient_lm.training.clock import Clock, stepping_seconds
from efficient_lm.training.interruption import Interruption
from efficient_lm.training.progress import Progress
from efficient_lm.training.run_directory import RunDirectory
from efficient_lm.training.session import Session
from efficient_lm.training.setup import Setup, prepare

LOG_EVERY = 10


def config_of(options: Any, folder: str) -> RunConfig:
    """A run of that shape on the embedded corpus."""
    keys = {
        "run.name": "loop", "run.dir": folder, "precision": options.dtype, "tracker": "tensorboard",
        "model.width": options.width, "model.repeats": options.layers, "model.vocab_size": options.vocabulary,
        "mixer.heads": options.heads, "ffn.hidden": options.hidden, "train.batch_size": options.batch,
        "train.sequence_length": options.time, "train.steps": 1_000_000, "train.log_every": LOG_EVERY,
        "schedule": "constant",
    }  # fmt: skip
    return load_run_config([f"{key}={value}" for key, value in keys.items()])


def step_arm(setup: Setup) -> Round:
    """The compiled step alone."""
    state = setup.fresh_state()
    batch = next(batches_of(setup))

    def run(steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = setup.step(state, batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start

    return run


def batches_of(setup: Setup, clock: Clock | None = None) -> Iterator[dict[str, jax.Array]]:
    """Batches on the device, as the loop puts them there."""
    batches = setup.portions.batches(setup.data, 0)
    for batch in clock.waiting(batches) if clock else batches:
        yield setup.layout.batch({name: array for name, array in batch.items() if name != "target_bytes"})


class LoopArm:
    """What a run does for a step."""

    def __init__(self, setup: Setup, run: RunDirectory):
        self.clock, self.state = Clock(), setup.fresh_state()
        self.session = Session(setup, run, Checkpoints(run.checkpoints), Progress(), self.clock, Interruption())
        self.session.rows.console.show = lambda row: None
        self.batches = batches_of(setup, self.clock)
        self.clock.begin()
        self.logging: list[float] = []
        self.session.rows.write = self._timed(self.session.rows.write)

    def _timed(self, write: Any) -> Any:
        def timed(row: dict[str, Any]) -> None:
            start = time.perf_counter()
            write(row)
            self.logging.append(time.perf_counter() - start)

        return timed

    def __call__(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.session.step(self.state, next(self.batches))
            self.session.stepped(metrics)
        # Only here, so that both arms end with their last step: a run goes on at once.
        jax.block_until_ready(metrics)
        return time.perf_counter() - start

    def save(self) -> float:
        """Seconds that a checkpoint holds up the run."""
        start = time.perf_counter()
        self.session.save(self.state, going_on=True)
        return time.perf_counter() - start


def report(options: Any) -> dict[str, Any]:
    """Measure, print, and return what is kept."""
    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(config_of(options, folder))
        with setup.layout.active(), RunDirectory(Path(folder)) as run:
            loop = LoopArm(setup, run)
            arms = {"loop": loop, "step": step_arm(setup)}
            alternate(arms, 1, 2)
            loop.logging.clear()
            before = loop.clock.seconds()
            seconds = alternate({"loop": loop, "step": arms["step"]}, options.rounds, options.steps)
            spent = {phase: value - before[phase] for phase, value in loop.clock.seconds().items()}
            logged, stalls, after = list(loop.logging), [], []
            for _ in range(options.saves):
                stalls.append(loop.save())
                after.append(loop(1))
                loop.session.checkpoints.wait()
                loop(1)
            loop.session.close()
    return _results(setup, seconds, spent, logged, stalls, after)


def _results(
    setup: Setup,
    seconds: dict[str, list[float]],
    spent: dict[str, float],
    logging: list[float],
    stalls: list[float],
    after: list[float],
) -> dict[str, Any]:
    step, row = statistics.median(seconds["step"]), statistics.median(logging)
    stepping = stepping_seconds(spent)
    results = {
        "loop_over_step": ratio(seconds, "loop", "step"),
        "step_seconds": step,
        "dispatch": spent["dispatch"] / stepping,
        "data_wait": spent["data_wait"] / stepping,
        "metrics_wait": spent["metrics_wait"] / stepping,
        "logged_row_seconds": row,
        "logging": row / LOG_EVERY / step,
        "checkpoint_stall_seconds": statistics.median(stalls),
        "checkpoint_stall_over_step": statistics.median(stalls) / step,
        "step_after_a_checkpoint_over_step": statistics.median(after) / step,
    }
    for name, value in results.items():
        print(f"{name:36}{value:.5f}", flush=True)
    counts = {"parameters": count_parameters(setup.model.declarations)}
    return {**results, **counts, "stalls": stalls, "seconds": seconds}


def main() -> None:
    parser = shapes(__doc__, hidden=688)
    parser.set_defaults(rounds=9, steps=10)
    parser.add_argument("--saves", type=int, default=5, help="checkpoints that are timed")
    options = parser.parse_args()
    keep("loop", options, report(options))


if __name__ == "__main__":
    main()
