"""Tokens of a mixture of experts divided over devices: each routes its own, to the same step."""

import pytest

EIGHT_DEVICES = """
    import jax, jax.numpy as jnp, numpy as np
    from efficient_lm.models.context import Context
    from efficient_lm.models.ffns.moe import MoESpec
    from efficient_lm.models.parameters import Blueprint, Initialization
    from efficient_lm.training.parallelism import ParallelismSpec

    x, segments = jax.random.normal(jax.random.key(1), (8, 6, 16)), jnp.ones((8, 6), jnp.int32).at[3:, 4:].set(0)

    def compiled_and_found(dispatch, count):
        values = {"kind": "moe", "experts": 4, "expert": {"kind": "swiglu", "hidden": 8}, "dispatch": dispatch,
                  "balance": {"load_balance": 0.1}, "router": {"normalize": True, "groups": 2, "top_groups": 1}}
        spec = MoESpec.model_validate(values)
        blueprint = Blueprint(lambda: spec.build(16, Initialization()))

        def loss(params, x, segments):
            y, auxiliary = blueprint(params)(x, Context(jnp.zeros_like(segments), segments))
            return jnp.mean(y**2) + auxiliary.losses["load_balance"], auxiliary.observed

        layout = ParallelismSpec(mesh={"data": count}).build(jax.devices()[:count])
        params = jax.device_put(blueprint.init(jax.random.key(0)), layout.replicated)
        with layout.active():
            rows = layout.batch({"x": np.asarray(x), "segments": np.asarray(segments)}).values()
            compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, *rows).compile()
            return compiled.as_text(), compiled(params, *rows)

    for dispatch in ({}, {"capacity_factor": 0.8}):
        wanted, (text, got) = compiled_and_found(dispatch, 1)[1], compiled_and_found(dispatch, 8)
        for value, reference in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(value, reference, rtol=1e-4, atol=1e-6)
        assert "all-reduce" in text
        assert "all-gather" not in text, "no device has to see the tokens of others"
    print("equal")
"""


@pytest.mark.slow
def test_every_device_routes_its_own_tokens(on_devices):
    assert on_devices(8, EIGHT_DEVICES) == "equal"
