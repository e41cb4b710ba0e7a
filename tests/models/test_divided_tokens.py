"""Every mixer computes the same, gradients too, where devices divide the tokens of packed rows among them."""

import pytest

EIGHT_DEVICES = """
    import jax, jax.numpy as jnp, numpy as np
    import efficient_lm.models.block
    from efficient_lm.models.context import Context
    from efficient_lm.models.mixers.base import MixerSpec
    from efficient_lm.models.parameters import Blueprint, Initialization
    from efficient_lm.training.parallelism import ParallelismSpec

    WIDTH, BATCH, TIME = 32, 2, 64
    ids = np.ones((BATCH, TIME), np.int32)
    ids[0, 10:45], ids[0, 45:60], ids[0, 60:], ids[1, 33:] = 2, 3, 0, 2
    starts = np.maximum.accumulate(np.where(np.diff(ids, axis=1, prepend=0) != 0, np.arange(TIME), 0), axis=1)
    context = Context(jnp.asarray(np.arange(TIME) - starts, jnp.int32), jnp.asarray(ids), layer=1, layers=4)
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(BATCH, TIME, WIDTH)), jnp.float32)
    layout = ParallelismSpec(mesh={{"fsdp": 2, "context": 4}}, rules={{"embed": "fsdp"}}).build()

    def slopes(blueprint, params):
        def loss(params, x):
            y = blueprint(params)(x, context)[0]
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)

    kinds = sorted(kind for kind, found in MixerSpec.kinds.items() if found.__module__.startswith("efficient_lm."))
    for kind in kinds[{part}::4]:
        found = MixerSpec.kinds[kind]
        spec = found(**({{"chunk_size": 16}} if "chunk_size" in found.model_fields else {{}})).resolved(WIDTH)
        blueprint = Blueprint(lambda: spec.build(WIDTH, Initialization()))
        params = jax.tree.map(lambda leaf: leaf + 0.1 * random.normal(size=leaf.shape).astype(np.float32),
                              blueprint.init(jax.random.key(0)))
        wanted = slopes(blueprint, params)
        with layout.active():
            got = slopes(blueprint, jax.device_put(params, layout.parameters(blueprint.declarations)))
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            scale = max(1.0, float(jnp.abs(other).max()))
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=5e-5 * scale, err_msg=kind)
    print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_every_mixer_with_divided_tokens(part, on_devices):
    assert on_devices(8, EIGHT_DEVICES.format(part=part)) == "equal"
