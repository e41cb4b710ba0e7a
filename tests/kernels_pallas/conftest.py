"""What tests of kernels share: values and gradients of an operator, their error, lowering for GPUs, races."""

import functools
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from kernels_pallas.target import Target, compiling_for, simulating


@pytest.fixture(scope="session")
def results() -> Callable[..., dict[str, np.ndarray]]:
    """``results(function, values)`` → its outputs "0", "1", ... and the gradients "dNAME" of a weighted sum of them.

    `function` takes the arrays of `values` by name; integers have no gradient. Every output counts in the sum, with
    weights that are the same for every function.
    """
    quick = {"xla_backend_optimization_level": 0}  # compiling takes longer than running

    def run(function: Callable, values: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
        floats = {name: value for name, value in values.items() if jnp.issubdtype(value.dtype, jnp.inexact)}
        rest = {name: value for name, value in values.items() if name not in floats}

        def loss(floats):
            outputs = jax.tree.leaves(function(**floats, **rest))
            random = np.random.default_rng(1)
            weights = [random.normal(size=x.shape) for x in outputs]
            total = sum(
                jnp.sum(x.astype(jnp.promote_types(x.dtype, "float32")) * w)
                for x, w in zip(outputs, weights, strict=True)
            )
            return total, outputs

        (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=quick)(floats)
        named = {str(i): value for i, value in enumerate(outputs)}
        named |= {f"d{name}": value for name, value in gradients.items()}
        return {name: np.asarray(value, np.float64) for name, value in named.items()}

    return run


@pytest.fixture
def in_spans(simulated, monkeypatch) -> Callable[..., Callable[..., tuple[dict, dict]]]:
    """``in_spans(op, module)(values, segment_ids, spans, chunk)`` → `simulated`, its kernels for Hopper, of `module`,
    with the length in so many spans of chunks."""

    def choose(op: Callable, module: ModuleType) -> Callable[..., tuple[dict, dict]]:
        def run(values: Mapping[str, jax.Array], segment_ids=None, spans: int = 1, chunk: int = 8):
            monkeypatch.setattr(module, "spans", lambda blocks, chunks: spans)
            return simulated(op, values, segment_ids=segment_ids, chunk_size=chunk)

        return run

    return choose


@pytest.fixture(scope="session")
def in_groups() -> Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """``in_groups(x, w, pull, sizes)`` → y, dx and dw of a grouped product in float64, group by group; the matrices as
    the products read them."""

    def run(x, w, pull, sizes):
        x, w, pull = (np.asarray(value, np.float64) for value in (x, w.astype(x.dtype), pull))
        y, dx, dw, start = np.zeros(pull.shape), np.zeros(x.shape), np.zeros(w.shape), 0
        for group, size in enumerate(sizes):
            rows = slice(start, start := start + size)
            y[rows], dx[rows] = x[rows] @ w[group], pull[rows] @ w[group].T
            dw[group] = x[rows].T @ pull[rows]
        return y, dx, dw

    return run


@pytest.fixture(scope="session")
def simulated(results) -> Callable[..., tuple[dict, dict]]:
    """``simulated(op, values, **options)`` → `results` of its kernels for Hopper GPUs in the interpreter, and of its
    definition in float32."""

    def run(op: Callable, values: Mapping[str, jax.Array], **options) -> tuple[dict, dict]:
        with simulating("gpu"):
            got = results(functools.partial(op, implementation="pallas", **options), values)
        exact = {name: value.astype(jnp.float32) for name, value in values.items()}
        return got, results(functools.partial(op, implementation="reference", **options), exact)

    return run


@pytest.fixture(scope="session")
def error() -> Callable[..., float]:
    """``error(got, wanted)`` → relative root mean square; NaN anywhere fails every comparison."""

    def measure(got, wanted) -> float:
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        assert got.shape == wanted.shape
        return np.sqrt(np.mean((got - wanted) ** 2)) / max(np.sqrt(np.mean(wanted**2)), 1e-6) if got.size else 0.0

    return measure


@pytest.fixture(scope="session")
def bound() -> Callable[..., float]:
    """``bound(name, dtype, decays)`` → the largest `error` of an entry of `results` of a kernel without tensor cores,
    for inputs of that dtype; `decays` names the inputs that act as decays."""

    def largest(name: str, dtype, decays=()) -> float:
        exact = jnp.dtype(dtype).itemsize >= 4
        if not name.startswith("d"):
            return 1e-5 if exact else 5e-3
        return 1e-4 if exact else 2e-2 if name[1:] in decays else 8e-3

    return largest


@pytest.fixture(scope="session")
def packed() -> Callable[..., jax.Array]:
    """``packed(batch, time)`` → segment ids [batch, time], time at least 26: documents of one token and of many, over
    the borders of chunks, with padding in front, inside, between two and behind."""

    def ids(batch: int, time: int) -> jax.Array:
        first = [0, 0, 3, 3, 0, 3, 1] + [2] * 13 + [0] * 3 + [7] * (time - 25) + [0] * 2
        second = [4] * (time - 6) + [0, 5, 6, 6, 6, 6]
        return jnp.asarray([(first, second)[row % 2] for row in range(batch)], jnp.int32)

    return ids


@pytest.fixture(scope="session")
def lowered_for_hopper() -> Callable[..., str]:
    """``lowered_for_hopper(function, *arguments)`` → the program for an H200: layouts, shared memory, primitives."""
    allowed = [export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu_v2", "mosaic_gpu")]

    def lower(function: Callable, *arguments: jax.ShapeDtypeStruct) -> str:
        with compiling_for(Target("gpu", "NVIDIA H200", hopper=True)):
            program = export.export(jax.jit(function), platforms=["cuda"], disabled_checks=allowed)(*arguments)
        return program.mlir_module()

    return lower


@pytest.fixture
def without_races(capfd: pytest.CaptureFixture) -> Iterator[None]:
    """Fails a test in which the GPU interpreter saw a race, which jax 0.11 only prints."""
    yield
    printed = "".join(capfd.readouterr())
    assert "RACE DETECTED" not in printed
