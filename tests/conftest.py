"""Tests run on the CPU, compile in a hurry, and keep compiled programs between sessions."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "efficient_lm" / "tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Two thirds of the time to compile, which is most of what a test takes.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test that is ``quick_for`` some of its cases, the others are slow."""
    for item in items:
        quick = item.get_closest_marker("quick_for")
        if quick is not None and item.callspec.id not in quick.args:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def heeding_signals() -> Iterator[None]:
    """What the shell has its background jobs ignore (`nohup make test &`) is heard here, and by what tests start."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    ignored = [number for number in defaults if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, defaults[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def optimized() -> Iterator[None]:
    """Programs are compiled as a user's are: their sums are rounded less often."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def drawn() -> Callable[..., Any]:
    """``drawn(built, moved=0.0, seed=0)`` → parameters of a model or a part, started as it declares, then moved.

    They are drawn on the host: a program that draws them takes longer to compile than most that use them.
    """
    import jax
    import jax.numpy as jnp

    from efficient_lm.models.parameters import Constant, map_declarations

    def draw(built: Any, moved: float = 0.0, seed: int = 0) -> Any:
        random = np.random.default_rng(seed)

        def start(declared: Any) -> jax.Array:
            way, shape = declared.initializer, declared.shape
            if isinstance(way, Constant):
                values = np.full(shape, way.value)
            else:
                source = {"normal": random.standard_normal, "uniform": random.random}.get(way.draw)
                values = way.values(shape, None if source is None else source(shape))
            return jnp.asarray(np.asarray(values) + moved * random.standard_normal(shape), jnp.float32)

        return map_declarations(start, built.declarations)

    return draw


@pytest.fixture
def until() -> Callable[[Callable[[], Any]], Any]:
    """``until(condition)``: waits until it holds, for a minute at most, and gives back what it returned."""

    def wait(condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 60
        while not (found := condition()):
            assert time.monotonic() < deadline, "it did not come to that"
            time.sleep(0.005)
        return found

    return wait


@pytest.fixture
def on_devices() -> Callable[[int, str], str]:
    """``on_devices(count, code)`` → what a script prints where there are so many devices; a fault in it is one here."""

    def run(count: int, code: str) -> str:
        flags = f"--xla_force_host_platform_device_count={count} --xla_backend_optimization_level=0"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip()

    return run
