"""Steps as a run takes them, watched from the host: what they cost, and what a user asked to see of them."""

import math
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

import jax

from efficient_lm.training.accounting import step_flops_per_token
from efficient_lm.training.clock import Clock, stepping_seconds
from efficient_lm.training.memory import memory_figures
from efficient_lm.training.probes import probe_row
from efficient_lm.training.processes import is_main
from efficient_lm.training.profile import FOLDER, Profile, span_of
from efficient_lm.training.setup import Setup
from kernels_pallas.benchmark.ceilings import matmul_flops


class Watch:
    """Runs a run's steps and measures them between one row of metrics and the next; traces and probes those asked for.

    Args:
        run_dir: where a trace goes.
        step: at which the session begins.
        tokens: seen before it.
    """

    def __init__(self, setup: Setup, clock: Clock, run_dir: Path, step: int, tokens: int):
        self.setup, self.clock, train = setup, clock, setup.config.train
        span = span_of(train.profile) if train.profile and is_main() else range(0)
        self._profile = Profile(span, run_dir / FOLDER)
        self._probes_every = train.probes and train.probes.every
        self._probed: dict[int, Any] = {}
        self._row_step, self._row_tokens, self._row_seconds = step, tokens, clock.seconds()
        self._compiled: set[tuple[str, tuple[int, ...]]] = set()
        self._flops: deque[float] = deque()
        """Of the steps that were begun and are in no row yet."""
        kind, dtype = jax.devices()[0].device_kind, setup.config.precision.compute
        peak = matmul_flops(kind, dtype)
        self._peak = peak and peak * jax.device_count()
        self._flops_per_token = cache(lambda length: step_flops_per_token(setup.config, setup.model, length))

    def step(self, number: int, state: dict[str, Any], batch: dict[str, jax.Array]) -> tuple[dict[str, Any], Any]:
        """Begin step `number`; returns as soon as the device has been told."""
        shape = batch["tokens"].shape
        self._flops.append(math.prod(shape) * self._flops_per_token(shape[1]))
        self._profile.before(number, state)
        if self._probes_every is not None and number % self._probes_every == 0:
            with self.clock.measure(self._phase("probe", shape)):
                self._probed[number] = self.setup.probe(state, batch)
        with self.clock.measure(self._phase("step", shape)), jax.profiler.StepTraceAnnotation("train", step_num=number):
            return self.setup.step(state, batch)

    def _phase(self, program: str, shape: tuple[int, ...]) -> str:
        known = (program, shape) in self._compiled
        self._compiled.add((program, shape))
        return "dispatch" if known else "compile"

    def read(self, step: int) -> dict[str, float | None] | None:
        """Step `step` has been read: what a probe saw of it, if one did."""
        self._profile.after(step)
        found = self._probed.pop(step, None)
        return None if found is None else probe_row(self.setup.model, found)

    def close(self) -> None:
        """End a trace that has not ended."""
        self._profile.stop()

    def figures(self, step: int, tokens: int) -> dict[str, float | int]:
        """What the steps up to `step`, with so many tokens in all, have cost since the row before.

        `tokens_per_second` and `step_seconds` are of the time of steps alone: compiling, evaluations and checkpoints
        are not in it. `data_wait`, `dispatch` and `metrics_wait` are shares of that time; `compile_seconds`,
        `evaluation_seconds` and `checkpoint_seconds` are there where there were any.
        """
        seconds = self.clock.seconds()
        spent = {phase: value - self._row_seconds[phase] for phase, value in seconds.items()}
        steps, tokens_done = step - self._row_step, tokens - self._row_tokens
        stepping = max(stepping_seconds(spent), 1e-9)
        flops = sum(self._flops.popleft() for _ in range(min(steps, len(self._flops))))
        self._row_step, self._row_tokens, self._row_seconds = step, tokens, seconds
        row: dict[str, float | int] = {"tokens_per_second": tokens_done / stepping}
        if self._peak is not None:
            row["mfu"] = flops / stepping / self._peak
        row["step_seconds"] = stepping / max(steps, 1)
        row |= {name: spent[name] / stepping for name in ("data_wait", "dispatch", "metrics_wait")}
        row |= {f"{name}_seconds": spent[name] for name in ("compile", "evaluation", "checkpoint") if spent[name]}
        return row | memory_figures()
