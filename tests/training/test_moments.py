"""Moments in fewer bits: what they hold, how near they stay, and what they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.models.parameters import ZEROS, Declaration
from efficient_lm.training import moments
from efficient_lm.training.moments import quantized, restored, stochastically_rounded
from efficient_lm.training.optimizers.adamw import AdamWSpec
from efficient_lm.training.optimizers.lion import LionSpec

DECLARATIONS = {
    "weight": Declaration((2, 64, 768), ("layers", "embed", "mlp"), True, ((1,), (2,)), ZEROS),
    "narrow": Declaration((1024, 5), ("embed", "heads"), True, ((0,), (1,)), ZEROS),
    "norm": Declaration((64,), ("embed",), False, None, ZEROS),
}
LARGE = 2 * 64 * 768
SMALL = 1024 * 5 + 64


def random(shape, seed=0, decades=0.0):
    found = np.random.default_rng(seed)
    return jnp.asarray(found.standard_normal(shape) * 10.0 ** -(decades * found.random(shape)), jnp.float32)


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_codes_are_those_of_dynamic_quantization():
    """Decades with half as many codes each as the one above (Dettmers et al. 2022, 2.1), in bins of one width."""
    values = np.asarray(random((8, 512), decades=6.0))
    for signed, top in ((True, 6), (False, 7)):
        given = values if signed else values**2
        kept = quantized(jnp.asarray(given), signed)
        assert kept.codes.shape == given.shape and kept.scales.shape == (8, 2)
        table = moments._values(signed).astype(np.float64)
        assert len(table) == 2 ** (top + 1) and np.all(np.diff(table) > 0) and table[-1] == 1
        scales = np.abs(given.reshape(8, 2, 256)).max(axis=-1, keepdims=True)
        parts = (np.abs(given).reshape(8, 2, 256) / scales).astype(np.float64)
        wrong = np.abs(np.abs(np.asarray(restored(kept))).reshape(8, 2, 256) / scales - parts)
        decade = np.clip(np.ceil(np.log10(parts)) + top, 0, top)
        width = 0.9 * 10.0 ** (decade - top) / 2.0**decade
        # The last bin stands for 1 and not for its middle, so that the largest of a block is exact.
        assert np.all(wrong <= np.where(parts > 1 - width, width, 0.5 * width + 0.1 * 10.0**-top) * 1.0001)
        np.testing.assert_allclose(wrong[parts == 1], 0, atol=1e-6)
        nearest = np.abs(parts[..., None] - table).min(axis=-1)
        assert np.mean(wrong <= nearest * 1.001 + 1e-7) > 0.8
        assert np.all(np.sign(restored(kept)) * np.sign(given) >= 0)
    assert np.all(np.asarray(restored(quantized(jnp.full((1, 256), 1e-30).at[0, 0].set(1.0), signed=False))) > 0)
    np.testing.assert_array_equal(restored(quantized(jnp.zeros((4, 256)), signed=True)), 0.0)


def test_rounding_is_right_on_average():
    value = jnp.full(20_000, 1.0 + 2.0**-9, jnp.float32)
    found = stochastically_rounded(value, jax.random.key(0)).astype(jnp.float32)
    assert set(np.unique(found)) == {1.0, 1.0078125}
    np.testing.assert_allclose(found.mean(), value[0], rtol=3e-4)
    exact = jnp.asarray([1.5, -2.0, 0.0, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(stochastically_rounded(exact, jax.random.key(1)).astype(jnp.float32), exact)


def run(spec, steps=12):
    """Parameters and optimizer state after steps towards a target, with noise, from zero."""
    optimizer = spec.build(lambda step: 1e-2, DECLARATIONS)
    params = {name: jnp.zeros(declared.shape) for name, declared in DECLARATIONS.items()}
    target = {name: random(declared.shape, 1) for name, declared in DECLARATIONS.items()}
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, key):
        noise = {name: 0.3 * jax.random.normal(key, leaf.shape) for name, leaf in params.items()}
        grads = jax.tree.map(lambda leaf, goal, off: leaf - goal + off, params, target, noise)
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for number in range(steps):
        params, state = step(params, state, jax.random.key(number))
    return params, state


@pytest.mark.parametrize(("precision", "bits", "near"), [("int8", 8 + 32 / 256, 0.05), ("bfloat16", 16, 0.01)])
def test_fewer_bits_stay_near_float32(precision, bits, near):
    wide, before = run(AdamWSpec(weight_decay=0.0))
    narrow, after = run(AdamWSpec(weight_decay=0.0, state=precision))
    # Blocks of five would need a scale for every five codes.
    small = 8 * 64 if precision == "bfloat16" else 8 * SMALL
    small += 2 * 2 * 5120 if precision == "bfloat16" else 0
    assert bytes_of(before) == 8 * (LARGE + SMALL) + 8
    assert bytes_of(after) == 2 * LARGE * bits / 8 + small + 12
    step = np.abs(wide["weight"]).mean()
    assert 0 < np.abs(narrow["weight"] - wide["weight"]).mean() < near * step
    np.testing.assert_array_equal(narrow["norm"], wide["norm"])


def test_a_second_moment_moves_in_bfloat16():
    """By a thousandth in a step, which rounding to the nearest would lose."""
    inner = AdamWSpec(state="bfloat16", beta2=0.999, weight_decay=0.0)
    optimizer = inner.build(lambda step: 0.0, {"weight": DECLARATIONS["weight"]})
    params = {"weight": jnp.zeros((2, 64, 768))}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(30):
        _, state = update({"weight": jnp.ones_like(params["weight"])}, state, params)
    second = state[0].state.nu["weight"]
    assert second.dtype == jnp.bfloat16
    np.testing.assert_allclose(second.astype(jnp.float32).mean(), 1 - 0.999**30, rtol=0.01)


def test_the_same_step_rounds_the_same_way():
    for precision in ("bfloat16", "int8"):
        first, second = (run(LionSpec(state=precision), 4) for _ in range(2))
        for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            np.testing.assert_array_equal(one, other)
