"""What tests of training share: programs on several devices of one machine."""

import os
import subprocess
import sys
import textwrap

import pytest


@pytest.fixture
def on_devices():
    """``on_devices(count, code)`` → what a script prints where there are so many devices; a fault in it is one here."""

    def run(count, code):
        flags = f"--xla_force_host_platform_device_count={count} --xla_backend_optimization_level=0"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip()

    return run
