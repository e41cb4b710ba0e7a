"""Options of attention: norms of queries and keys over one head or all, a scale per layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.mixers.attention import AttentionSpec
from efficient_lm.models.parameters import Blueprint, Initialization, parameter_table

WIDTH, TIME = 32, 9


def model_of(**options):
    block = {"mixer": {"kind": "attention", "heads": 4, "kv_heads": 2, **options}}
    spec = {"width": WIDTH, "vocab_size": 31, "blocks": {"layer": block}, "layout": ["layer"], "repeats": 2}
    return ModelSpec.model_validate(spec)


def attend(x, params, over, clip=np.inf):
    """float64 attention without positions; queries and keys `[time, heads, size]` are normed over the axes `over`."""
    q, pair = (np.einsum("te,e...->t...", x, params[name]["weight"]) for name in ("query", "key_value"))
    k, v = pair[:, 0], pair[:, 1]
    q = q / np.sqrt(np.mean(q**2, over, keepdims=True) + 1e-6) * params["query_norm"]["scale"]
    k = k / np.sqrt(np.mean(k**2, over, keepdims=True) + 1e-6) * params["key_norm"]["scale"]
    q, k, v = (np.clip(part, -clip, clip) for part in (q, k, v))
    k, v = np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)
    logits = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(np.where(np.tri(len(x)), logits, -np.inf))
    y = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v)
    return np.einsum("thd,hde->te", y, params["output"]["weight"])


@pytest.mark.parametrize(
    ("name", "over", "shape", "clip"),
    [("head", (2,), (8,), None), ("all", (1, 2), (2, 8), None), ("all", (1, 2), (2, 8), 0.5)],
)
def test_queries_and_keys_are_normed_over_one_head_or_all_and_clipped(name, over, shape, clip, drawn):
    options = {"qk_norm": {"kind": "rmsnorm"}, "qk_norm_over": name, "clip": clip, "position": {"kind": "none"}}
    spec = AttentionSpec(heads=4, kv_heads=2, **options)
    mixer = Blueprint(lambda: spec.build(WIDTH, Initialization()))
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(2), leaf.shape), drawn(mixer))
    assert params["key_norm"]["scale"].shape == shape
    x = jax.random.normal(jax.random.key(1), (1, TIME, WIDTH))
    got = jax.jit(lambda params, x: mixer(params)(x, Context.rows(1, TIME))[0])(params, x)
    want = attend(np.asarray(x[0], np.float64), jax.tree.map(np.float64, params), over, clip or np.inf)
    np.testing.assert_allclose(got[0], want, atol=1e-5 * np.abs(want).max())


def test_a_norm_over_all_heads_declares_their_axes():
    norm = {"kind": "layernorm"}
    table = dict(parameter_table(model_of(qk_norm=norm, qk_norm_over="all").build().declarations))
    inner = "stack.segment_0.layer_0.mixer.inner"
    assert table[f"{inner}.query_norm.scale"].axes == ("layers", "heads", "head_dim")
    assert table[f"{inner}.key_norm.bias"].axes == ("layers", "kv_heads", "head_dim")
    with pytest.raises(ConfigError, match="qk_norm_over: 'all' says what qk_norm is over, and there is none"):
        model_of(qk_norm_over="all")


def test_the_scale_may_differ_by_layer(drawn):
    assert [layer.mixer.scale for layer in model_of(scale=[0.5, None]).layers()] == [0.5, None]
    plain, same, other = (model_of(scale=scale).build() for scale in (None, [8**-0.5, 8**-0.5], [8**-0.5, 3.0]))
    ids, params = jnp.arange(TIME)[None], drawn(plain)
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], params["stack"]["segment_0"]) for i in (0, 1)]
    apart = {**params, "stack": {f"segment_{i}": layer for i, layer in enumerate(layers)}}
    want = jax.jit(plain.logits)(params, ids)
    np.testing.assert_allclose(jax.jit(same.logits)(params, ids), want, atol=1e-6)
    assert np.abs(jax.jit(other.logits)(apart, ids) - want).max() > 1e-3


def test_the_output_gate_multiplies_what_each_head_attended_to(drawn):
    spec = AttentionSpec(heads=4, kv_heads=2, output_gate=True)
    gated, plain = (
        Blueprint(lambda spec=spec: spec.build(WIDTH, Initialization()))
        for spec in (spec, AttentionSpec(heads=4, kv_heads=2))
    )
    params = drawn(gated)
    x, rows = jax.random.normal(jax.random.key(1), (1, TIME, WIDTH)), Context.rows(1, TIME)
    gate = 1 / (1 + np.exp(-np.einsum("bte,ehd->bthd", x, params["gate"]["weight"])))
    # With an output map of one, what the heads attended to is read off.
    eye = {"weight": jnp.eye(WIDTH).reshape(4, 8, WIDTH)}
    rest = {name: value for name, value in params.items() if name != "gate"} | {"output": eye}
    attended = plain(rest)(x, rows)[0].reshape(1, TIME, 4, 8)
    got = gated({**params, "output": eye})(x, rows)[0].reshape(1, TIME, 4, 8)
    np.testing.assert_allclose(got, attended * gate, atol=1e-5)
    more = spec.flops_per_token(WIDTH, 9) - AttentionSpec(heads=4, kv_heads=2).flops_per_token(WIDTH, 9)
    assert more == 2 * WIDTH * WIDTH
