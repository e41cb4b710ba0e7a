"""Mixtures of experts in training steps, in scans over layers, and in decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.objectives.causal_lm import CausalLMSpec
from efficient_lm.training.step import initial_state, make_step

RATE, TIME, BATCH = 0.01, 12, 4
FFN = {
    "kind": "moe",
    "experts": 4,
    "expert": {"kind": "swiglu", "hidden": 8},
    "router": {"scores": "sigmoid", "normalize": True, "correction": True},
    "balance": {"load_balance": 0.01, "router_z": 0.001, "correction_rate": RATE},
}


def spec(mixer=None, **options):
    blocks = {"layer": {"mixer": mixer, "ffn": FFN}}
    values = {"width": 16, "vocab_size": 31, "blocks": blocks, "layout": ["layer"], "repeats": 2, **options}
    return ModelSpec.model_validate(values)


def batch():
    rng = np.random.default_rng(0)
    segments = np.ones((BATCH, TIME), np.int32)
    segments[1, 7:], segments[3, 9:] = 2, 0
    positions = np.where(segments == 2, np.arange(TIME) - 7, np.arange(TIME)).astype(np.int32)
    tokens = rng.integers(0, 31, (BATCH, TIME)).astype(np.int32)
    weights = (segments != 0).astype(np.float32)
    return {"tokens": tokens, "targets": tokens, "segment_ids": segments, "positions": positions, "weights": weights}


def test_a_step_trains_experts_and_moves_the_correction_by_all_its_counts(drawn):
    model, optimizer, rows = spec().build(), optax.sgd(0.1), batch()
    state = initial_state(drawn(model), optimizer)
    context = Context(jnp.asarray(rows["positions"]), jnp.asarray(rows["segment_ids"]))
    whole = jax.jit(lambda params: model.hidden(params, rows["tokens"], context)[2])(state["parameters"])
    before = state["parameters"]["stack"]["segment_0"]["layer_0"]["ffn"]["inner"]
    stepped, metrics = jax.jit(make_step(model, CausalLMSpec(), optimizer, accumulate=2))(state, rows)
    after = stepped["parameters"]["stack"]["segment_0"]["layer_0"]["ffn"]["inner"]
    load = np.asarray(whole.observed["segment_0"]["layer_0"]["expert_load"])
    assert load.shape == (2, 4)
    assert np.all(load.sum(1) == 2 * rows["weights"].sum())
    np.testing.assert_allclose(
        after["router"]["correction"], RATE * np.sign(load.mean(1, keepdims=True) - load), rtol=1e-6
    )
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)).max(), before, after)
    assert moved["router"]["weight"] > 0
    assert min(jax.tree.leaves(moved["experts"])) > 0
    assert {"load_balance", "router_z", "router_entropy", "load_imbalance"} <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.slow
def test_scanned_layers_are_the_unrolled_ones(drawn):
    rows = batch()
    model, unrolled = spec().build(), spec(scan=False, remat="none").build()
    params = drawn(model)

    def gradient(model):
        return jax.jit(jax.grad(lambda params: CausalLMSpec().sums(model, params, rows, jnp.float32).loss))(params)

    for got, wanted in zip(*(jax.tree.leaves(gradient(which)) for which in (model, unrolled)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5 * float(jnp.abs(wanted).max() + 1e-6))


def test_decoding_is_the_parallel_form(drawn):
    model = spec({"kind": "attention", "heads": 2}).build()
    params, tokens = drawn(model), jnp.asarray(batch()["tokens"])
    rows, caches, pieces, start = Context.rows(BATCH, TIME), model.init_caches(BATCH, TIME), [], 0
    want = jax.jit(model.logits)(params, tokens)
    run = jax.jit(lambda params, ids, context, caches: model.hidden(params, ids, context, caches)[:2])
    for length in (9, 1, 1, 1):
        piece = slice(start, start + length)
        context = Context(rows.positions[:, piece], rows.segment_ids[:, piece], "decode" if start else "prefill")
        hidden, caches = run(params, tokens[:, piece], context, caches)
        pieces.append(model.logits_from(params, hidden))
        start += length
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), want, atol=2e-5 * float(jnp.abs(want).max()))
