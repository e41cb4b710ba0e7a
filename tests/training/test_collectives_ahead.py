"""What an FSDP step exchanges on pods: every parameter gathered twice, its gradient scattered once, and little else."""

import jax
import jax.numpy as jnp
import optax
import pytest

from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.parameters import count_parameters
from efficient_lm.objectives.causal_lm import CausalLMSpec
from efficient_lm.training.parallelism import ParallelismSpec
from efficient_lm.training.step import abstract_state, make_step
from kernels_pallas import ahead
from kernels_pallas.ahead.collectives import collectives
from kernels_pallas.dispatch import preferring

BLOCK = {
    "mixer": {"kind": "attention", "heads": 8, "kv_heads": 2, "head_size": 64},
    "ffn": {"kind": "swiglu", "hidden": 2048},
}


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["h200:1x8"])
def test_a_step_sends_what_fsdp_cannot_do_without(topology):
    devices = list(ahead.devices(topology))
    values = {"width": 512, "vocab_size": 8192, "blocks": {"layer": BLOCK}, "layout": ["layer"], "repeats": 4}
    model, optimizer = ModelSpec.model_validate(values | {"tied": True}).build(), optax.adamw(1e-3)
    layout = ParallelismSpec(mesh={"fsdp": -1}, rules={"embed": "fsdp"}).build(devices)
    step = make_step(model, CausalLMSpec(), optimizer, clip_norm=1.0, dtype=jnp.bfloat16)
    state, batch = abstract_state(model, optimizer, layout), layout.abstract_batch(len(devices), 512)
    homes = jax.tree.map(lambda leaf: leaf.sharding, state), layout.replicated
    with layout.active(), preferring("xla"):
        compiled = ahead.compile_ahead(
            step, (state, batch), topology, layout.mesh, donate_argnums=0, out_shardings=homes
        )
    ideal = 6 * count_parameters(model.declarations) * 7 / 8
    sent = sum(each.moved for each in collectives(compiled.program.as_text()))
    assert 0.5 * ideal < sent < 1.05 * ideal
