"""Mixture of depths in a short training, around a mixture of experts, and put around layers of a dense model."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.evaluation.attention_rank import attention_ranks, lowest_ranks
from efficient_lm.evaluation.decisions import decisions
from efficient_lm.evaluation.layerwise import Layerwise
from efficient_lm.models.context import Context
from efficient_lm.models.depth.mixture_of_depths import MixtureOfDepthsSpec
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.objectives.causal_lm import CausalLMSpec
from efficient_lm.training.step import initial_state, make_step
from efficient_lm.upcycling.mixture_of_depths import RULE, with_mixture_of_depths
from efficient_lm.validation import validate

WIDTH, TIME, VOCABULARY = 32, 128, 128
TEXT = np.frombuffer((Path(__file__).parents[2] / "LICENSE").read_bytes(), np.uint8).astype(np.int32)


def model_of(depth=None, ffn=None, repeats=2):
    ffn = ffn or {"kind": "mlp", "hidden": 64}
    blocks = {"layer": {"mixer": {"kind": "attention", "heads": 2}, "ffn": ffn, "depth": depth}}
    values = {"width": WIDTH, "vocab_size": VOCABULARY, "blocks": blocks, "layout": ["layer"], "repeats": repeats}
    return validate(ModelSpec, values).build()


def batch_of(key, rows=4):
    """Rows of a text's bytes, from anywhere."""
    starts = np.asarray(jax.random.randint(key, (rows, 1), 0, len(TEXT) - TIME))
    tokens, context = TEXT[starts + np.arange(TIME + 1)], Context.rows(rows, TIME)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": np.asarray(context.positions),
            "segment_ids": np.asarray(context.segment_ids), "weights": np.ones((rows, TIME), np.float32)}  # fmt: skip


def trained(model, steps):
    optimizer = optax.adam(3e-3)
    step = jax.jit(make_step(model, CausalLMSpec(), optimizer, clip_norm=1.0))
    state = initial_state(jax.jit(model.init)(jax.random.key(0)), optimizer)
    seen = []
    for number in range(steps):
        state, metrics = step(state, batch_of(jax.random.key(number)))
        seen.append(metrics)
    return state["parameters"], seen


@pytest.mark.slow
@pytest.mark.parametrize(("decide", "weight"), [("predictor", "identity"), ("router", "sigmoid")])
def test_decisions_learn_what_top_k_says(decide, weight):
    """After a short training 95 % of decisions are those of top-k, and the loss by them is within 1 %."""
    rule = {"kind": "mixture_of_depths", "capacity": 0.125, "every": 2, "decide": decide, "weight": weight}
    rule["decision_loss"] = 0.1
    model = model_of(rule)
    params, seen = trained(model, 150)
    assert seen[-1]["loss"] < seen[0]["loss"] and seen[-1]["depth_router"] < seen[0]["depth_router"]
    held_out = batch_of(jax.random.key(1000), rows=8)
    (row,) = decisions(model, params, held_out)
    assert row["layer"] == 1 and row["depth_accuracy"] >= 0.95
    assert row["depth_share"] == pytest.approx(0.125, abs=0.05)

    def loss(spec):
        model = spec.build()
        sums = jax.jit(lambda params: CausalLMSpec().sums(model, params, held_out, jnp.float32))(params)
        return float(sums.metrics["cross_entropy"] / sums.weight)

    assert abs(loss(model.spec.decided("causal")) / loss(model.spec) - 1) < 0.01


@pytest.mark.slow
def test_around_a_mixture_of_experts(drawn):
    """Staged MoDE: the tokens that run a block are those that its experts see; records are of whole rows."""
    ffn = {"kind": "moe", "experts": 4, "top_k": 2, "expert": {"kind": "swiglu", "hidden": 16}}
    model = model_of({"kind": "mixture_of_depths", "capacity": 0.25}, ffn, repeats=1)
    params, tokens = drawn(model), batch_of(jax.random.key(0), 2)["tokens"]
    rows = Context.rows(2, TIME)
    context = Context(rows.positions, rows.segment_ids, record=True)

    @jax.jit
    def loss(params):
        logits, auxiliary = model.hidden(params, tokens, context)[::2]
        return jnp.sum(jnp.sin(logits)) + sum(auxiliary.losses.values()), auxiliary

    gradients, auxiliary = jax.jit(jax.grad(loss, has_aux=True))(params)
    observed = auxiliary.observed["segment_0"]["layer_0"]
    ran, routes = np.asarray(observed["ran"])[0], np.asarray(observed["routes"])[0]
    assert ran.sum(axis=1).tolist() == [TIME // 4] * 2 and routes.shape == (2, TIME, 2)
    np.testing.assert_array_equal((routes >= 0).all(axis=-1), ran)
    np.testing.assert_array_equal((routes < 0).all(axis=-1), ~ran)
    layer = gradients["stack"]["segment_0"]["layer_0"]
    assert np.any(layer["depth"]["router"]["weight"]) and np.any(layer["ffn"]["inner"]["router"]["weight"])


@pytest.fixture(scope="module")
def dense():
    model = model_of(repeats=4)
    return model, trained(model, 20)[0]


@pytest.mark.slow
def test_ranks_of_attention(dense):
    """A layer whose queries are all zero attends to everything before alike, and the rank of that is known."""
    model, params = dense
    quiet = jax.tree.map(lambda leaf: leaf, params)
    query = quiet["stack"]["segment_0"]["layer_0"]["mixer"]["inner"]["query"]
    query["weight"] = query["weight"].at[2].set(0.0)
    ranks = attention_ranks(model, quiet, batch_of(jax.random.key(7), 2))
    assert [rank.shape for rank in ranks] == [(2,)] * 4
    uniform = np.tril(np.ones((TIME, TIME))) / np.arange(1, TIME + 1)[:, None]
    values = np.linalg.svd(uniform, compute_uv=False)
    np.testing.assert_allclose(ranks[2], np.sum(values > 0.01 * values[0]), atol=0.1)
    low, high = np.array([1.0, 3.0]), np.array([2.0, 3.0])
    assert lowest_ranks([None, high, None, low], 0.5) == [3] and lowest_ranks([low, high, high, low], 0.5) == [0, 3]


@pytest.mark.slow
def test_layers_of_a_dense_model_get_the_rule(dense):
    """With all tokens and p-MoD's weights little changes; with half, what a layer changes more runs, rather."""
    model, params = dense
    batch = batch_of(jax.random.key(7), 4)
    tokens, key = batch["tokens"], jax.random.key(1)
    before = jax.jit(model.logits)(params, tokens)
    spec, new = with_mixture_of_depths(model, params, [1, 3], key, RULE.model_copy(update={"capacity": 1.0}))
    assert [layer.depth is not None for layer in spec.layers()] == [False, True, False, True]
    after = jax.jit(spec.build().logits)(new, tokens)
    assert jnp.linalg.norm(after - before) < 0.02 * jnp.linalg.norm(before)

    def look(block, spec, x, context):
        y, _, auxiliary = block(x, context)
        return y, {"change": jnp.linalg.norm(y - x, axis=-1) / jnp.linalg.norm(x, axis=-1), **auxiliary.observed}

    spec, new = with_mixture_of_depths(model, params, [1, 3], key, RULE, batch)
    changes = Layerwise(model, look).batch(params, batch)[1]["change"]
    ran = Layerwise(spec.build(), look, record=True).batch(new, batch)[1]["ran"]
    assert ran.mean() == 0.5 and changes[ran].mean() > 1.02 * changes[~ran].mean()
    rows = decisions(spec.build(), new, batch)
    assert [row["layer"] for row in rows] == [1, 3]
    assert rows[0]["depth_accuracy"] > 0.9 and rows[0]["depth_share"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("layers", "rule", "said"),
    [
        ([], RULE, "name the layers"),
        ([1], MixtureOfDepthsSpec(every=2), "leave 'every' at 1"),
        ([4], RULE, "there is no layer 4; valid: 0 to 3"),
    ],
)
def test_faults_of_the_conversion(dense, layers, rule, said):
    with pytest.raises(ConfigError, match=said):
        with_mixture_of_depths(*dense, layers, jax.random.key(0), rule)
