"""Which block sizes run fastest here: a kernel is measured with each of those it lists, and its table is written."""

import itertools
from collections.abc import Iterator, Mapping

import jax

from kernels_pallas import kernel, tuning
from kernels_pallas.benchmark import forms, gate, timing
from kernels_pallas.benchmark.cases import Case
from kernels_pallas.target import current


def tune(case: Case, rounds: int) -> Iterator[tuple[Mapping[str, int], float | str]]:
    """Measure every choice of blocks, yielding it with its milliseconds or what is wrong with it; then write the best.

    A choice that does not compile or computes something else is passed over. Of operators with a gradient the time
    is of forward and backward together. The times of the other implementations go into the table too: `auto` compares.

    Raises:
        ValueError: no kernel runs on this machine, or none of the choices works.
    """
    target = current()
    held = kernel.module(case.op, target)
    if held is None:
        raise ValueError(f"{case.op}: no kernel for {(target.obstacles() or [f'a {target.kind}'])[0]}")
    training, arrays = bool(case.call.training), case.inputs()
    best: tuple[float, Mapping[str, int]] | None = None
    with tuning.asked() as asked:
        jax.eval_shape(forms.forward(case, "pallas"), arrays)
    for blocks in choices(held.CHOICES):
        with tuning.trying(case.op, blocks):
            try:
                faults = gate.wrong(case, "pallas")
                found = "; ".join(faults) or _milliseconds(case, "pallas", training, rounds, arrays)
            except (ValueError, RuntimeError) as error:
                found = str(error).splitlines()[0]
        yield blocks, found
        if isinstance(found, float) and (best is None or found < best[0]):
            best = found, blocks
    if best is None:
        raise ValueError(f"{case.op}: no choice of blocks works for {case.name}")
    times = {"pallas": best[0]} | _rivals(case, training, rounds, arrays)
    tuning.write(case.op, target.kind, asked[0], {"blocks": best[1], "milliseconds": times})


def _rivals(case: Case, training: bool, rounds: int, arrays) -> dict[str, float]:
    """Milliseconds of the other implementations that the operator has, run here, and compute the right thing."""
    times = {}
    for name in ("xla", "cudnn", "tokamax"):
        try:
            if not gate.wrong(case, name):
                times[name] = _milliseconds(case, name, training, rounds, arrays)
        except (ValueError, RuntimeError):
            continue
    return times


def choices(sizes: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, int]]:
    """Every combination of the sizes that a kernel lists for its blocks."""
    for values in itertools.product(*sizes.values()):
        yield dict(zip(sizes, values, strict=True))


def _milliseconds(case: Case, implementation: str, training: bool, rounds: int, arrays) -> float:
    run = jax.jit(
        forms.training(forms.forward(case, implementation)) if training else forms.forward(case, implementation)
    )
    return float(f"{timing.measured(lambda: run(arrays), rounds).median:.4g}")
