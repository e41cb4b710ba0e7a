"""Tokens divided over devices: every operator gives the values and gradients of one device, packed documents too."""

import textwrap

import pytest

COMMON = """
    import functools
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, Mesh
    from kernels_pallas.attention import attention
    from kernels_pallas.delta_rule import delta_rule
    from kernels_pallas.linear_attention import linear_attention
    from kernels_pallas.linear_recurrence import linear_recurrence
    from kernels_pallas.selective_scan import selective_scan
    from kernels_pallas.short_convolution import short_convolution

    random, B, T = np.random.default_rng(0), 2, 32
    # Documents that cross borders, that end at one, that are as long as several parts; padding in front, as a whole
    # part, between documents and at the end.
    ids = np.ones((B, T), np.int32)
    ids[0, 5:8], ids[0, 8:21], ids[0, 21:], ids[0, 30:] = 2, 3, 4, 0
    ids[1, :3], ids[1, 8:16], ids[1, 16:19], ids[1, 19:] = 0, 0, 1, 2
    ids = jnp.asarray(ids)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    def decay(*shape):
        return -jnp.abs(draw(*shape)) * 0.3

    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "context"), axis_types=(AxisType.Auto,) * 2)

    def compare(name, function, *arrays):
        def loss(*arrays):
            out = function(*arrays)
            return sum(jnp.sum(jnp.sin(leaf + 0.3)) for leaf in jax.tree.leaves(out)), out

        def run():
            return jax.jit(jax.value_and_grad(loss, tuple(range(len(arrays))), has_aux=True))(*arrays)

        wanted = run()
        with jax.set_mesh(mesh):
            got = run()
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            # Sums in another order: float32 rounding of the largest values.
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5 * max(1, jnp.abs(other).max()), err_msg=name)
"""

RECURRENT = """
    for packed in (None, ids):
        options = {"segment_ids": packed}
        q, k, v, start = draw(B, T, 2, 4), draw(B, T, 2, 4), draw(B, T, 4, 3), draw(B, 4, 4, 3)
        for log_decay in (None, decay(B, T, 4), decay(B, T, 4, 4)):
            run = lambda q, k, v, s, *d: linear_attention(q, k, v, *d, initial_state=s, **options)
            compare("linear_attention", run, q, k, v, start, *([] if log_decay is None else [log_decay]))
        unit = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
        run = lambda q, k, v, b, d, s: delta_rule(q, k, v, b, d, initial_state=s, **options)
        compare("delta_rule", run, q, unit, v, jax.nn.sigmoid(draw(B, T, 4)), decay(B, T, 4), start)
        run = lambda a, x, s: linear_recurrence(a, x, initial_state=s, **options)
        compare("linear_recurrence", run, decay(B, T, 6), draw(B, T, 6), draw(B, 6))
        run = lambda u, dt, A, b, c, d, s: selective_scan(u, dt, A, b, c, d, initial_state=s, **options)
        compare("selective_scan", run, draw(B, T, 6), -decay(B, T, 6), decay(6, 4), draw(B, T, 4), draw(B, T, 4),
                draw(6), draw(B, 6, 4))
        for taps in (4, 12):
            run = lambda x, w, b, s: short_convolution(x, w, b, initial_state=s, **options)
            compare("short_convolution", run, draw(B, T, 6), draw(taps, 6), draw(6), draw(B, taps - 1, 6))
    print("equal")
"""

ATTENTION = """
    q, k, v = draw(B, T, 4, 4), draw(B, T, 2, 4), draw(B, T, 2, 4)
    slopes = jnp.asarray([0.1, 0.2, 0.3, 0.4])[None, :, None, None]
    far = -slopes * jnp.abs(jnp.arange(T)[:, None] - jnp.arange(T)).astype(jnp.float32)
    places = jnp.broadcast_to(2 * jnp.arange(T, dtype=jnp.int32), (B, T))
    for options in (
        {}, {"window": 5}, {"softcap": 2.0}, {"causal": False}, {"causal": False, "window": 6},
        {"window": 5, "kept": 2}, {"prefix_length": jnp.asarray([11, 3])},
        {"query_positions": places, "key_positions": places, "window": 9}, {"return_lse": True},
    ):
        compare(str(options), functools.partial(attention, segment_ids=ids, **options), q, k, v)
    compare("whole rows", functools.partial(attention, window=12), q, k, v)
    biased = lambda q, k, v, sinks, bias: attention(q, k, v, sinks=sinks, bias=bias, segment_ids=ids)
    compare("bias", biased, q, k, v, draw(4), far)
    with jax.set_mesh(mesh):
        text = jax.jit(lambda *a: attention(*a, window=5)).lower(q, k, v).as_text()
    assert text.count("collective_permute") == 2, "a window shorter than a part asks for the keys of one neighbour"
    print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [RECURRENT, ATTENTION], ids=["recurrent", "attention"])
def test_operators_with_divided_tokens(code, on_devices):
    assert on_devices(8, textwrap.dedent(COMMON) + textwrap.dedent(code)) == "equal"
