"""Layers that a router chooses from how a document begins."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.inference.decoding import Decoder
from efficient_lm.inference.sampling import SamplingSpec
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.objectives.causal_lm import CausalLMSpec

VOCAB, WIDTH, TIME, FIRST = 23, 16, 12, 3
IDS = jax.random.randint(jax.random.key(5), (2, TIME), 0, VOCAB)


@pytest.fixture(scope="module")
def model():
    rule = {"kind": "router_skip", "tokens": FIRST, "skip_loss": 0.1, "undecided_loss": 0.2}
    layer = {"mixer": {"kind": "attention", "heads": 2}, "ffn": {"kind": "mlp"}, "depth": rule}
    spec = {"width": WIDTH, "vocab_size": VOCAB, "blocks": {"layer": layer}, "layout": ["layer"], "repeats": 4}
    return ModelSpec.model_validate(spec).build()


@pytest.fixture(scope="module")
def params(model, bold):
    params = bold(model)
    router = params["stack"]["segment_0"]["layer_0"]["depth"]
    router["weight"], router["bias"] = 6 * router["weight"], jnp.zeros(4)
    return params


@pytest.fixture(scope="module")
def run(model):
    @jax.jit
    def run(params, ids, context, caches):
        context = replace(context, record=True)
        hidden, caches, auxiliary = model.hidden(params, ids, context, caches)
        return hidden, caches, model.stack.ran(auxiliary.observed, context.segment_ids != 0)[0]

    return run


@pytest.fixture(scope="module")
def whole(run, params):
    hidden, _, ran = run(params, IDS, replace(Context.rows(2, TIME), packed=True), None)
    return np.asarray(hidden), np.asarray(ran)


def test_a_document_decides_once_and_its_first_tokens_run(whole):
    ran = whole[1]
    assert np.all(ran[..., :FIRST]) and np.all(ran[..., FIRST:] == ran[..., FIRST : FIRST + 1])
    # Some layers are skipped, not by all documents alike.
    later = ran[..., -1]
    assert 0 < later.mean() < 1 and np.any(later[:, 0] != later[:, 1])


def test_decoding_equals_the_full_pass(model, params, run, whole):
    rows = Context.rows(2, TIME)
    caches, hidden, ran, start = model.init_caches(2, TIME), [], [], 0
    # The decision falls behind the prompt, among single tokens.
    for length in (2, *(1 for _ in range(TIME - 2))):
        piece = slice(start, start + length)
        context = Context(rows.positions[:, piece], rows.segment_ids[:, piece], "decode" if start else "prefill")
        y, caches, halves = run(params, IDS[:, piece], context, caches)
        hidden, ran, start = [*hidden, y], [*ran, halves], start + length
    np.testing.assert_allclose(np.concatenate(hidden, 1), whole[0], atol=1e-5 * np.abs(whole[0]).max())
    assert np.array_equal(np.concatenate(ran, -1), whole[1])


def test_a_packed_document_decides_for_itself(params, run, whole):
    # The last seven tokens' place is taken by a document of its own; the other row is padding and a document.
    lengths = (5, 7)
    segments = jnp.array([[1] * 5 + [2] * 7, [0] * 5 + [3] * 7])
    positions = jnp.array([[*range(5), *range(7)], [0] * 5 + [*range(7)]])
    ids = jnp.stack([jnp.concatenate([IDS[0, :5], IDS[1, :7]]), jnp.concatenate([IDS[0, :5], IDS[1, :7]])])
    hidden, _, ran = run(params, ids, Context(positions.astype(jnp.int32), segments.astype(jnp.int32)), None)
    assert sum(lengths) == TIME
    np.testing.assert_allclose(hidden[0, :5], whole[0][0, :5], atol=1e-5 * np.abs(whole[0]).max())
    for row in range(2):
        np.testing.assert_allclose(hidden[row, 5:], whole[0][1, :7], atol=1e-5 * np.abs(whole[0]).max())
        assert np.array_equal(ran[:, row, 5:], whole[1][:, 1, :7])
    assert not np.any(ran[:, 1, :5])


def test_the_gradient_reaches_the_router_and_its_costs_are_counted(model, params):
    rows = Context.rows(2, TIME)
    batch = {"tokens": IDS, "targets": jnp.roll(IDS, -1, 1), "weights": jnp.ones((2, TIME))}
    batch |= {"positions": rows.positions, "segment_ids": rows.segment_ids}

    def loss(params):
        sums = CausalLMSpec().sums(model, params, batch, jnp.float32, False, jax.random.key(0))
        return sums.loss, sums

    gradient, sums = jax.jit(jax.grad(loss, has_aux=True))(params)
    router = gradient["stack"]["segment_0"]["layer_0"]["depth"]
    assert np.all(np.abs(router["bias"]) > 0) and np.all(np.abs(router["weight"]).max(-1) > 0)
    # Four layers at most: 0.1 for running each, 0.2 for being undecided about each.
    metrics = {name: float(value) / (2 * TIME) for name, value in sums.metrics.items()}
    assert 0 < metrics["router_skip"] < 0.4 and 0 < metrics["router_undecided"] < 0.8
    assert float(sums.loss) / (2 * TIME) == pytest.approx(
        metrics["cross_entropy"] + metrics["router_skip"] + metrics["router_undecided"], rel=1e-5
    )


def test_a_decoder_reports_what_routers_chose(model, params, whole):
    decoder = Decoder(model, params)
    list(decoder.stream([np.asarray(IDS[1])], 5, SamplingSpec(temperature=0.0)))
    report = decoder.report
    assert report.tokens == 4 and report.mixers.tolist() == (4.0 * whole[1][:, 1, -1]).tolist()
    assert report.figures()["flops_share"] < 1
