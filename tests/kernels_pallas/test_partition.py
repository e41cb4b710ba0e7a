"""Kernels under a mesh: every device has its part, gradients of what is whole are summed, uneven axes stay whole."""

FOUR_DEVICES = """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh

    from kernels_pallas.partition import partitioned

    seen = []

    def run(x, scale, absent):
        assert absent is None
        seen.append((x.shape, scale.shape))
        return jnp.cumsum(x, axis=1) * scale, jnp.sum(x, axis=1)

    def loss(x, scale):
        axes = ("batch", None, "heads"), ("heads",), ("batch",)
        y, last = partitioned(run, (x, scale, None), axes, (("batch", None, "heads"), ("batch", "heads")))
        return jnp.sum(y**2) + jnp.sum(last**3)

    def gradients(batch, heads):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, 3, heads)))
        scale = jnp.arange(1.0, heads + 1)
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, scale)

    wanted = [gradients(4, 6), gradients(3, 6), gradients(4, 5)]
    assert seen == [((4, 3, 6), (6,)), ((3, 3, 6), (6,)), ((4, 3, 5), (5,))]
    seen.clear()
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        got = [gradients(4, 6), gradients(3, 6), gradients(4, 5)]
    assert set(seen) == {((2, 3, 3), (3,)), ((3, 3, 3), (3,)), ((2, 3, 5), (5,))}, seen
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)

    rows = jax.P("data")
    inside = jax.shard_map(lambda x, s: loss(x, s)[None], mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    seen.clear()
    jax.jit(inside)(jnp.ones((4, 3, 2)), jnp.ones(2))
    assert seen == [((2, 3, 2), (1,))], seen
    print("equal")
"""


def test_each_device_has_its_part(on_devices):
    assert on_devices(4, FOUR_DEVICES) == "equal"
