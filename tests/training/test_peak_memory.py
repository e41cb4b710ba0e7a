"""The memory a plan says a step takes on a CPU, against what the process's resident set grows by in real steps."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path

import jax

from efficient_lm.config import load_run_config
from efficient_lm.training.compiling import peak_bytes
from efficient_lm.training.portions import trained_on
from efficient_lm.training.setup import prepare


def resident(line):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(line + ":")[1].split()[0])


def give_back():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


config = load_run_config(sys.argv[1:])
predicted = peak_bytes(config)
setup = prepare(config)
with setup.layout.active():
    # Compiled first, what makes the state too: a compiler takes memory of its own.
    jax.block_until_ready(setup.fresh_state())
    shapes = setup.abstract_state(), setup.layout.abstract_batch(*setup.portions.largest.batch)
    step = setup.step.lower(*shapes).compile()
    batches = setup.portions.batches(setup.data, 0, *setup.layout.part)
    batch = trained_on(next(batches))
    give_back()
    before = resident("VmRSS")
    state = jax.block_until_ready(setup.fresh_state())
    give_back()  # the initializers' temporaries: freed, and kept by malloc beside what the step takes
    Path("/proc/self/clear_refs").write_text("5")  # from here on the highest is counted anew
    for _ in range(3):
        state, metrics = jax.block_until_ready(step(state, setup.layout.batch(batch)))
print(json.dumps({"predicted": predicted, "measured": resident("VmHWM") - before}))
"""

CONFIGS = {
    "attention": ["experiment=quickstart", "train.batch_size=16"],
    "mamba2": ["experiment=quickstart", "nesting=none", "mixer=mamba2", "train.accumulate=2", "train.batch_size=32"],
    "experts": ["experiment=moe_tiny"],
    "wide": ["experiment=quickstart", "nesting=none", "model.width=512", "mixer.heads=8"],
}


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux counts the highest anew")
@pytest.mark.parametrize("config", CONFIGS)
def test_predicted_and_measured_peaks_are_within_a_tenth(config):
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    # Programs of the compile cache stay in memory as they were read, some 20 MB of them beside what the step takes.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), *CONFIGS[config]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.1), found
