"""Differential attention against its equations, written out token by token, and the properties of every mixer."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.mixers.differential_attention import DifferentialAttentionSpec
from efficient_lm.models.parameters import Blueprint, Initialization

VOCAB, TIME, WIDTH = 61, 20, 32
OPTIONS = {
    "grouped": {"heads": 8, "kv_heads": 4}, "window": {"window": 5, "kept_tokens": 2},
    "alibi": {"position": {"kind": "alibi"}, "head_norm": {"kind": "rmsnorm"}},
    "much": {"sink_logit": True, "softcap": 3.0, "qk_norm": {"kind": "rmsnorm"}, "bias": True, "output_bias": True},
}  # fmt: skip


def model_of(repeats=2, **options):
    mixer = {"kind": "differential_attention", "heads": 4, "kv_heads": 2, **options}
    block = {"mixer": mixer}
    spec = {"width": WIDTH, "vocab_size": VOCAB, "blocks": {"layer": block}, "layout": ["layer"], "repeats": repeats}
    return ModelSpec.model_validate(spec).build()


def tokens(batch=2, key=7):
    return jax.random.randint(jax.random.key(key), (batch, TIME), 0, VOCAB)


def assert_close(got, want, tolerance=1e-5):
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(got, want, atol=tolerance * float(np.abs(want).max()))


def softmax_row(q, keys, first):
    """float64 weights of one query `[size]` over keys `[seen, size]`, zero before `first`."""
    logits = keys @ q / np.sqrt(len(q))
    weights = np.where(np.arange(len(keys)) >= first, np.exp(logits - logits.max()), 0)
    return weights / weights.sum()


def by_the_equations(x, params, heads, kv_heads, start, window):
    """`x [time, width]` → `[time, width]`, float64, one token and one pair at a time; no position encoding."""
    q, pair = (np.einsum("te,e...->t...", x, params[name]["weight"]) for name in ("query", "key_value"))
    k, v = pair[:, 0], pair[:, 1]
    learned = np.exp(np.sum(params["lambda_query"] * params["lambda_key"], -1))
    factor = learned[0] - learned[1] + start
    y = np.zeros((len(x), heads // 2, 2 * q.shape[-1]))
    for t in range(len(x)):
        for h in range(heads // 2):
            group = h // (heads // kv_heads)
            partner = group + kv_heads // 2
            values = np.concatenate([v[: t + 1, group], v[: t + 1, partner]], -1)
            first = softmax_row(q[t, h], k[: t + 1, group], t + 1 - window)
            second = softmax_row(q[t, h + heads // 2], k[: t + 1, partner], t + 1 - window)
            out = (first - factor * second) @ values
            y[t, h] = (1 - start) * out / np.sqrt(np.mean(out**2) + 1e-5)
    return y.reshape(len(x), -1) @ params["output"]["weight"].reshape(-1, x.shape[-1])


@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(4, 4, 99), (4, 2, 99), (8, 4, 6)])
def test_equals_its_equations(heads, kv_heads, window, drawn):
    spec = DifferentialAttentionSpec(
        heads=heads, kv_heads=kv_heads, head_size=8, window=window, position={"kind": "none"}, lambda_init=0.35
    )
    mixer = Blueprint(lambda: spec.build(WIDTH, Initialization()))
    params = jax.tree.map(lambda leaf: 2 * leaf, drawn(mixer))
    x = jax.random.normal(jax.random.key(1), (2, TIME, WIDTH))
    got = jax.jit(lambda params, x: mixer(params)(x, Context.rows(2, TIME))[0])(params, x)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for row, y in zip(np.asarray(x, np.float64), got, strict=True):
        assert_close(y, by_the_equations(row, wide, heads, kv_heads, 0.35, window))


@pytest.mark.quick_for("window")
@pytest.mark.parametrize("name", OPTIONS)
def test_prefill_and_decoding_equal_the_full_pass(name, bold):
    model = model_of(**OPTIONS[name])
    params, ids, rows = bold(model), tokens(), Context.rows(2, TIME)
    want = jax.jit(model.logits)(params, ids)
    caches, pieces, start = model.init_caches(2, TIME), [], 0
    run = jax.jit(lambda params, ids, context, caches: model.hidden(params, ids, context, caches)[:2])
    for length in (6, 1, 6, 1, 6):
        piece, mode = slice(start, start + length), "decode" if start else "prefill"
        context = Context(rows.positions[:, piece], rows.segment_ids[:, piece], mode)
        hidden, caches = run(params, ids[:, piece], context, caches)
        pieces.append(hidden)
        start += length
    assert_close(model.logits_from(params, jnp.concatenate(pieces, 1)), want)


@pytest.mark.quick_for("grouped")
@pytest.mark.parametrize("name", OPTIONS)
def test_documents_stay_apart_and_the_future_is_not_seen(name, bold):
    model = model_of(**OPTIONS[name])
    params, ids = bold(model), tokens(1)
    logits = jax.jit(model.logits)
    segments = jnp.array([[1] * 8 + [2] * 8 + [0] * 4])
    positions = jnp.array([[*range(8), *range(8), 0, 0, 0, 0]], jnp.int32)
    packed = logits(params, ids, Context(positions, segments))
    alone = logits(params, jnp.concatenate([ids[:, :8], ids[:, 8:16]]))
    assert_close(packed[0, :16].reshape(alone.shape), alone)
    changed = ids.at[:, 12:].set((ids[:, 12:] + 1) % VOCAB)
    before, after = logits(params, jnp.concatenate([ids, changed]))
    np.testing.assert_allclose(before[:12], after[:12], atol=1e-6)
    assert np.abs(before[12:] - after[12:]).max() > 0.1


def test_every_parameter_takes_part(bold):
    model = model_of(sink_logit=True, bias=True, output_bias=True, head_norm={"kind": "layernorm"})
    gradients = jax.jit(jax.grad(lambda params, ids: model.logits(params, ids).std()))(bold(model), tokens())
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradients))


def test_bfloat16_tracks_float32(bold):
    model = model_of()
    params, ids = bold(model), tokens()
    wide, narrow = (
        jax.jit(lambda p, i, d=d: model.logits(p, i, dtype=d))(params, ids) for d in ("float32", "bfloat16")
    )
    assert np.sqrt(np.mean((narrow - wide) ** 2)) < 0.05 * np.sqrt(np.mean(wide**2))


def gradient_program(repeats):
    model = model_of(repeats=repeats)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return str(jax.make_jaxpr(jax.grad(lambda p: model.logits(p, tokens()).sum()))(params)).count("\n")


def test_lambda_starts_by_depth_in_a_program_that_does_not_grow(bold):
    params = bold(model_of())
    given = model_of(lambda_init=[0.2, 0.8 - 0.6 * math.exp(-0.3)])
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], params["stack"]["segment_0"]) for i in (0, 1)]
    apart = {**params, "stack": {f"segment_{i}": layer for i, layer in enumerate(layers)}}
    want = jax.jit(given.logits)(apart, tokens())
    assert_close(jax.jit(model_of().logits)(params, tokens()), want)
    flat = jax.jit(model_of(lambda_init=0.2).logits)(params, tokens())
    assert np.abs(flat - want).max() > 1e-3 * np.abs(want).max()
    assert gradient_program(9) == gradient_program(3)


def test_the_learned_part_of_lambda_starts_small():
    spec = DifferentialAttentionSpec(head_size=512, lambda_init=0.2)
    params = jax.jit(Blueprint(lambda: spec.build(2048, Initialization())).init)(jax.random.key(0))
    assert float(params["lambda_query"].std()) == pytest.approx(0.1, rel=0.1)


def test_cost_by_hand():
    spec = DifferentialAttentionSpec(heads=4, kv_heads=2)
    # Scores of 8 values and sums of 16, per head and token seen; then the maps of queries, keys, values and output.
    assert spec.flops_per_token(32, 9) == pytest.approx(2 * 4 * (8 + 16) * 5 + 2 * 32 * (32 + 16 + 16 + 32))
    caches = model_of(window=4, kept_tokens=2).init_caches(1, 1000)
    assert caches["segment_0"]["layer_0"]["value"].shape == (2, 1, 6, 2, 8)


def test_heads_are_an_even_number_unless_given():
    assert [DifferentialAttentionSpec().head_count(width) for width in (64, 192, 256, 320)] == [2, 2, 4, 4]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 1, "kv_heads": None}, "mixer.heads: 1 cannot be paired, and every head needs a partner: take 2"),
        ({"kv_heads": 1}, "mixer.kv_heads: 1 cannot be paired"),
        ({"heads": 16, "kv_heads": 6}, "mixer.kv_heads: 6 do not divide 16 heads"),
    ],
)
def test_faults_name_the_key(options, words):
    with pytest.raises(ConfigError) as error:
        model_of(**options)
    assert words in str(error.value)
