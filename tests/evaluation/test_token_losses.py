"""The head in blocks of tokens and vocabulary against a softmax over whole logits."""

import jax
import numpy as np
import pytest

from efficient_lm.evaluation import token_losses as module
from efficient_lm.evaluation.token_losses import token_losses
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec

BLOCK = {"layer": {"mixer": {"kind": "attention", "heads": 2}, "ffn": {"kind": "swiglu", "hidden": 24}}}


@pytest.mark.parametrize(
    "blocks", [(7, 10), *(pytest.param(blocks, marks=pytest.mark.slow) for blocks in [(64, 64), (32, 8), (1, 23)])]
)
@pytest.mark.parametrize(
    "options",
    [{"tied": True, "logit_softcap": 2.0}, {"logit_multiplier": 3.0}, {"tied": True, "logit_multiplier": 0.5}],
)
def test_blocks_change_nothing(monkeypatch, blocks, options, drawn):
    monkeypatch.setattr(module, "CPU_BLOCK", blocks)
    spec = ModelSpec(width=16, vocab_size=23, blocks=BLOCK, layout=["layer"], embedding_std=1.0, **options)
    model = spec.build()
    params = drawn(model)
    tokens, targets = np.random.default_rng(0).integers(0, 23, (2, 3, 8), dtype=np.int32)
    context = Context.rows(3, 8)
    batch = {"tokens": tokens, "positions": context.positions, "segment_ids": context.segment_ids}
    logits = np.asarray(model.logits(params, tokens), np.float64)
    expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    found = jax.jit(lambda params, batch: token_losses(model, params, batch, "float32"))
    scores = found(params, {**batch, "targets": targets})
    np.testing.assert_allclose(scores.losses, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(scores.likeliest, logits.argmax(-1) == targets)
    chosen = np.array([5, 23, 5, 0, 11], np.int32)
    likeliest = logits.argmax(-1).reshape(-1)[chosen].astype(np.int32)
    scores = found(params, {**batch, "chosen": chosen, "targets": likeliest})
    expected = -jax.nn.log_softmax(logits.reshape(-1, 23)[chosen])[np.arange(5), likeliest]
    np.testing.assert_allclose(scores.losses, expected, rtol=1e-5, atol=1e-5)
    assert np.all(scores.likeliest)
