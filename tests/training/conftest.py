"""Runs of several real processes."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Started:
    """Processes of one run: `wait` gives exit statuses, `output` what each has said so far."""

    popens: list[subprocess.Popen]
    files: list[Path]
    began: float = field(default_factory=time.monotonic)

    def output(self, index: int) -> str:
        return self.files[index].read_text()

    def wait(self, seconds: float = 300) -> list[int]:
        """The exit statuses of all; whoever is not done in time is killed, and fails the test."""
        deadline = time.monotonic() + seconds
        try:
            return [popen.wait(max(deadline - time.monotonic(), 0.1)) for popen in self.popens]
        except subprocess.TimeoutExpired:
            self.kill()
            said = "\n".join(f"--- {index}\n{self.output(index)[-2000:]}" for index in range(len(self.popens)))
            raise AssertionError(f"still running after {seconds} s\n{said}") from None

    def until(self, condition: Callable[[], Any], seconds: float = 300) -> None:
        """Wait for something that the processes do."""
        deadline = time.monotonic() + seconds
        while not condition():
            alive = all(popen.poll() is None for popen in self.popens)
            assert alive and time.monotonic() < deadline, "\n".join(map(self.output, range(len(self.popens))))
            time.sleep(0.02)

    def kill(self) -> None:
        for popen in self.popens:
            popen.kill()
            popen.wait()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Started]]:
    """``processes(count, devices, arguments)`` starts ``efficient-lm train *arguments`` in each of so many processes.

    Each has so many virtual CPU devices. `arguments` may be a list for all, or a function of the process's index;
    further keywords are environment variables (None removes one). What still runs when the module ends is killed.
    """
    everything = []

    def start(
        count: int,
        devices: int,
        arguments: list[str] | Callable[[int], list[str]],
        verb: str = "train",
        **environment: str | None,
    ) -> Started:
        folder, address = tmp_path_factory.mktemp("processes"), f"127.0.0.1:{_free_port()}"
        many = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)} if count > 1 else {}
        popens, files = [], []
        for index in range(count):
            variables = {
                **os.environ,
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
                **many,
                **({"JAX_PROCESS_ID": str(index)} if many else {}),
                **environment,
            }
            own = arguments(index) if callable(arguments) else arguments
            files.append(folder / f"{index}.txt")
            with open(files[-1], "w") as output:
                popens.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "efficient_lm", verb, *own],
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env={name: value for name, value in variables.items() if value is not None},
                    )
                )
        everything.append(Started(popens, files))
        return everything[-1]

    yield start
    for started in everything:
        started.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
