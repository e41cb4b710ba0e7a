"""Multi-head latent attention against its equations, written out in float64, and what its cache holds."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.layers.positions import RotarySpec
from efficient_lm.models.mixers.attention import AttentionSpec
from efficient_lm.models.mixers.multi_latent import MultiLatentSpec
from efficient_lm.models.parameters import Blueprint, Initialization

WIDTH, TIME = 16, 14
SIZES = {"heads": 3, "head_size": 5, "rotary_size": 4, "value_size": 6, "latent_size": 7}
CASES = {
    "plain": MultiLatentSpec(**SIZES),
    "interleaved": MultiLatentSpec(**SIZES, position=RotarySpec(interleaved=True, theta=50.0)),
    "no position": MultiLatentSpec(**SIZES, position={"kind": "none"}, scale=0.7),
    "much": MultiLatentSpec(
        **SIZES, query_rank=8, window=5, kept_tokens=2, sink_logit=True, bias=True, output_bias=True, mscale=0.5,
        position=RotarySpec(scaling={"kind": "linear", "factor": 4.0}),
    ),
}  # fmt: skip


@pytest.fixture
def built(bold):
    """``built(name)`` → the mixer of a case, and its parameters."""

    def make(name):
        spec = CASES[name]
        mixer = Blueprint(lambda: spec.build(WIDTH, Initialization()))
        return mixer, bold(mixer)

    return make


def linear(x, p):
    return np.einsum("te,e...->t...", x, p["weight"]) + p.get("bias", 0.0)


def normed(x, p):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * p["scale"]


def turned(x, position):
    """`x [time, ..., 4]`: pairs of values as complex numbers, times ``exp(i t f)``."""
    if position.kind == "none":
        return x
    slow = position.scaling.factor if position.scaling else 1.0
    frequencies = position.theta ** -np.array([0.0, 0.5]) / slow
    pairs = x[..., ::2] + 1j * x[..., 1::2] if position.interleaved else x[..., :2] + 1j * x[..., 2:]
    angles = np.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)) * frequencies
    pairs = pairs * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], -1)


def by_the_equations(spec, x, p):
    if spec.query_rank is None:
        q = linear(x, p["query"])
    else:
        q = linear(normed(linear(x, p["query_down"]), p["query_norm"]), p["query_up"])
    latent = normed(linear(x, p["latent"]), p["latent_norm"])
    k, v = linear(latent, p["key"]), linear(latent, p["value"])
    shared, turning = turned(linear(x, p["rotary_key"]), spec.position), turned(q[..., 5:], spec.position)
    scale, y = (spec.scale or 9**-0.5) * (0.1 * spec.mscale * math.log(4.0) + 1) ** 2, np.zeros((len(x), 3, 6))
    for t in range(len(x)):
        seen = [s for s in range(t + 1) if spec.window is None or t - s < spec.window or s < spec.kept_tokens]
        for h in range(3):
            weights = np.exp(scale * (k[seen, h] @ q[t, h, :5] + shared[seen] @ turning[t, h]))
            total = weights.sum() + (np.exp(p["sinks"][h]) if spec.sink_logit else 0)
            y[t, h] = weights @ v[seen, h] / total
    return np.einsum("thv,hve->te", y, p["output"]["weight"]) + p["output"].get("bias", 0.0)


@pytest.mark.quick_for("plain")
@pytest.mark.parametrize("name", CASES)
def test_training_and_decoding_equal_the_equations(name, built):
    """Decoding goes another way: it looks at latents, in pieces of one token and of several."""
    mixer, params = built(name)
    x = jax.random.normal(jax.random.key(2), (2, TIME, WIDTH))
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    want = np.stack([by_the_equations(CASES[name], row, wide) for row in np.asarray(x, np.float64)])
    tolerance = 1e-5 * np.abs(want).max()
    np.testing.assert_allclose(mixer(params)(x, Context.rows(2, TIME))[0], want, atol=tolerance)
    run = jax.jit(lambda x, context, cache: mixer(params)(x, context, cache))
    rows, cache, made, start = Context.rows(2, TIME), mixer(params).init_cache(2, TIME, jnp.float32), [], 0
    for length in (4, 1, 4, 1, 4):
        piece, mode = slice(start, start + length), "decode" if start else "prefill"
        context = Context(rows.positions[:, piece], rows.segment_ids[:, piece], mode)
        y, cache = run(x[:, piece], context, cache)
        made.append(y)
        start += length
    np.testing.assert_allclose(jnp.concatenate(made, 1), want, atol=tolerance)


def test_the_cache_holds_latents_only():
    spec = MultiLatentSpec(heads=32, head_size=16)
    mixer = Blueprint(lambda: spec.build(512, Initialization()))
    cache = jax.eval_shape(lambda: mixer(jax.tree.map(lambda d: None, mixer.declarations)).init_cache(2, 9, "bfloat16"))
    assert cache["latent"].shape == (2, 9, 1, 4 * 16 + 8)
    attention = Blueprint(lambda: AttentionSpec(heads=32, head_size=16).build(512, Initialization()))
    full = jax.eval_shape(
        lambda: attention(jax.tree.map(lambda d: None, attention.declarations)).init_cache(2, 9, "bfloat16")
    )
    assert 14 * cache["latent"].size < full["key"].size + full["value"].size


def test_entropy_is_of_the_weights(built):
    mixer, params = built("plain")
    x = jax.random.normal(jax.random.key(2), (1, TIME, WIDTH))
    found = mixer(params).entropy(x, Context.rows(1, TIME))
    assert found.shape == (1, 3)
    still = {**params, "query": jax.tree.map(jnp.zeros_like, params["query"])}
    uniform = np.mean([math.log(t + 1) for t in range(TIME)])
    np.testing.assert_allclose(mixer(still).entropy(x, Context.rows(1, TIME)), uniform, rtol=1e-5)
    assert np.all(found < uniform)


def test_sizes_and_cost_by_hand():
    sizes = MultiLatentSpec().resolved(512)
    found = (sizes.heads, sizes.head_size, sizes.rotary_size, sizes.value_size, sizes.latent_size)
    assert found == (4, 128, 64, 128, 512)
    assert sizes.logit_scale() == pytest.approx(192**-0.5)
    latents = 2 * 16 * (7 + 4) + 2 * 7 * 3 * (5 + 6)
    attended = 2 * 3 * (9 + 6) * 5
    plain = MultiLatentSpec(**SIZES).flops_per_token(16, 9)
    assert plain == pytest.approx(latents + 2 * 16 * 3 * 9 + 2 * 16 * 18 + attended)
    ranked = MultiLatentSpec(**SIZES, query_rank=8).flops_per_token(16, 9)
    assert ranked == pytest.approx(latents + 2 * 8 * (16 + 27) + 2 * 16 * 18 + attended)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 3}, "mixer.heads: 3 heads do not divide width 16; nearest that do: 1, 2, 4, or set head_size"),
        ({"rotary_size": 3}, "mixer.rotary_size: rotary positions turn pairs of values, and 3 is odd"),
        ({"kept_tokens": 2}, "mixer.kept_tokens: tokens are kept beyond a window, and there is none"),
    ],
)
def test_faults_name_the_key(options, words):
    blocks = {"layer": {"mixer": {"kind": "multi_latent", **options}}}
    with pytest.raises(ConfigError) as error:
        ModelSpec.model_validate({"width": WIDTH, "vocab_size": 9, "blocks": blocks, "layout": ["layer"]})
    assert words in str(error.value)
