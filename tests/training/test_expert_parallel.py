"""Experts divided over devices: the same losses as on one, no token dropped, and degrees that cannot be are refused."""

import jax
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.training.parallelism import ParallelismSpec

EIGHT_DEVICES = """
    import jax, numpy as np, optax
    from efficient_lm.models.language_model import ModelSpec
    from efficient_lm.objectives.causal_lm import CausalLMSpec
    from efficient_lm.training.parallelism import ParallelismSpec
    from efficient_lm.training.step import initial_state, make_step, state_shardings

    assert jax.device_count() == 8
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 32, (8, 17), dtype=np.int32)
    live = np.arange(16) < draw.integers(8, 17, (8, 1))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": live.astype(np.int32),
             "positions": np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16)), "weights": live.astype(np.float32)}

    def losses(mesh, rules, accumulate, **options):
        ffn = {"kind": "moe", "experts": 8, "top_k": 2, "expert": {"kind": "swiglu", "hidden": 16},
               "balance": {"load_balance": 0.1, "correction_rate": 0.1},
               "router": {"correction": True, "normalize": True}, **options}
        block = {"mixer": {"kind": "attention", "heads": 2}, "ffn": ffn}
        model = ModelSpec(width=16, vocab_size=32, blocks={"layer": block}, layout=["layer"], repeats=2).build()
        layout, optimizer = ParallelismSpec(mesh=mesh, rules=rules).build(), optax.adamw(1e-2)
        shardings = state_shardings(model, optimizer, layout)
        with layout.active():
            start = jax.jit(lambda key: initial_state(model.init(key), optimizer), out_shardings=shardings)
            step = jax.jit(make_step(model, CausalLMSpec(), optimizer, accumulate=accumulate),
                           donate_argnums=0, out_shardings=(shardings, layout.replicated))
            state, found = start(jax.random.key(0)), []
            for _ in range(3):
                state, metrics = step(state, layout.batch(batch))
                found.append([float(metrics[name]) for name in ("loss", "load_balance", "grad_norm")])
            text = step.lower(state, layout.batch(batch)).compile().as_text()
        return np.array(found), state, "all-to-all" in text

    alone, reference, _ = losses({"data": 8}, {}, 1)
    for mesh in ({"expert": 8}, {"data": 2, "fsdp": 2, "expert": 2}):
        divided, state, exchanged = losses(mesh, {"experts": "expert"}, 1)
        np.testing.assert_allclose(divided, alone, rtol=2e-5)
        assert exchanged
        router = lambda state: state["parameters"]["stack"]["segment_0"]["layer_0"]["ffn"]["inner"]["router"]
        np.testing.assert_allclose(router(state)["correction"], router(reference)["correction"], atol=1e-6)
        weight = state["parameters"]["stack"]["segment_0"]["layer_0"]["ffn"]["inner"]["experts"]["down"]["weight"]
        assert weight.sharding.spec[1] == "expert"
    bound = {"dispatch": {"capacity_factor": 0.75}}
    np.testing.assert_allclose(losses({"data": 2, "expert": 4}, {"experts": "expert"}, 1, **bound)[0],
                               losses({"data": 8}, {}, 1, **bound)[0], rtol=2e-5)
    print("equal")
"""


@pytest.mark.slow
def test_divided_experts_compute_the_same(on_devices):
    assert on_devices(8, EIGHT_DEVICES) == "equal"


@pytest.mark.parametrize(
    ("mesh", "rules", "words"),
    [
        ({"expert": 3}, {"experts": "expert"}, "3 devices do not divide the 8 experts of model.blocks.layer.ffn; "
         "valid: 1, 2, 4, 8"),
        ({"expert": 2}, {}, "parallelism.mesh.expert: 2 devices, but no rule puts experts there"),
    ],
)  # fmt: skip
def test_degrees_that_cannot_be(mesh, rules, words):
    layout = ParallelismSpec(mesh=mesh, rules=rules).build(jax.devices()[:1] * mesh["expert"])
    block = {"mixer": {"kind": "attention", "heads": 2}, "ffn": {"kind": "moe", "experts": 8}}
    model = ModelSpec(width=16, vocab_size=32, blocks={"layer": block}, layout=["layer"])
    with pytest.raises(ConfigError) as error:
        layout.check_experts(model)
    assert words in str(error.value)
