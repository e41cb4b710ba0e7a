"""What tests of training share: programs on several devices of one machine."""

import os
import subprocess
import sys
import textwrap

import pytest


@pytest.fixture
def on_devices():
    """``on_devices(count, code)`` runs a script where there are so many devices; it must end with `print("equal")`."""

    def run(count, code):
        flags = f"--xla_force_host_platform_device_count={count} --xla_backend_optimization_level=0"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "equal", done.stderr[-2000:]

    return run
