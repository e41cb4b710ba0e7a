"""Whole training steps with kernels compile for accelerators that are not there, on one and on 64 of them."""

import pytest

from efficient_lm.config import load_run_config
from efficient_lm.training.compiling import compiled_step, defined_for
from efficient_lm.training.machines import Machine
from kernels_pallas import ahead

MEMORY = {"h200": 140e9, "v5p": 95e9}
KERNELS = {"mamba_130m": "selective_scan", "mamba2_130m": "chunk_states", "transformer_350m": "attention"}


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["h200", "h200:8x8", "v5p:2x2x1", "v5p:4x4x4"])
@pytest.mark.parametrize("experiment", KERNELS)
def test_steps_with_kernels_compile(experiment, topology):
    """Rows of a device as in the experiment's micro-batch; with 64 devices each runs the kernels on its own rows."""
    kind = topology.split(":")[0]
    chips = ahead.devices(topology)
    chips = chips if len(chips) == 64 else chips[:1]
    keys = [f"experiment={experiment}", "data=sotu", "tokenizer=bytes", "model.vocab_size=50304"]
    keys += [f"train.batch_size={8 * len(chips)}", "train.accumulate=1"]
    keys += ["train.kernels=pallas"]
    machine = Machine(tuple(chips), topology)
    compiled = compiled_step(defined_for(load_run_config(keys), machine), machine)
    assert compiled.peak_bytes < MEMORY[kind]
    if kind == "h200":
        assert any(KERNELS[experiment] in kernel.name for kernel in compiled.kernels)
        assert {kernel.name: kernel.spilled_bytes for kernel in compiled.kernels if kernel.spilled_bytes} == {}
        assert [kernel.name for kernel in compiled.kernels if kernel.serialized] == []
    else:
        assert compiled.program.as_text().count("tpu_custom_call") >= 3
