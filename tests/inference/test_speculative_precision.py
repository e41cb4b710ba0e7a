"""Drafted text in bfloat16: not always that of decoding token by token, but as good, within rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.elastic.choices import choose
from efficient_lm.elastic.submodels import submodel_parameters, submodel_spec
from efficient_lm.inference.decoding import Decoder
from efficient_lm.inference.sampling import SamplingSpec
from efficient_lm.inference.speculative import SpeculativeDecoder
from efficient_lm.models.language_model import ModelSpec

PROMPTS = [np.array([5], np.int32), np.array([1, 2, 3, 4, 5, 6, 7], np.int32), np.array([9, 8, 7], np.int32)]
NEW = 24
ROUNDING = 2.0**-8
"""Of one result in bfloat16, relative to it; those of a few layers add up."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixer", "stored"),
    [({"kind": "attention", "heads": 2}, jnp.float32), ({"kind": "mamba2", "head_size": 8}, jnp.bfloat16)],
    ids=["attention", "mamba2"],
)
def test_every_token_is_the_likeliest_within_rounding(drawn, mixer, stored):
    """With parameters `stored` in float32, and in bfloat16 too."""
    block = {"mixer": mixer, "ffn": {"kind": "mlp", "hidden": 32}}
    values = {"width": 16, "vocab_size": 23, "blocks": {"layer": block}, "layout": ["layer"], "repeats": 2}
    model = ModelSpec.model_validate(values | {"init_std": 0.4}).build()
    params = jax.tree.map(lambda leaf: leaf.astype(stored), drawn(model))
    choice = choose(model, {"ffn": 0.5})
    small = submodel_spec(model, choice).build()
    drafts = [(small, submodel_parameters(model, small, params, choice.layers))]
    decoder = SpeculativeDecoder(model, params, drafts, jnp.bfloat16, tokens=3)
    texts = [
        np.stack(list(each.stream(PROMPTS, NEW, SamplingSpec(temperature=0.0))), 1)
        for each in (decoder, Decoder(model, params, jnp.bfloat16))
    ]
    assert 0 < decoder.report.accepted < decoder.report.drafted
    logits = jax.jit(lambda tokens: model.logits(params, tokens, dtype=jnp.bfloat16))
    for rows in texts:
        for prompt, row in zip(PROMPTS, rows, strict=True):
            # What follows changes nothing before it: rows of one length are one program.
            whole = np.concatenate([prompt, row, np.zeros(7 - len(prompt), np.int32)])[None]
            found = np.asarray(logits(whole))[0, len(prompt) - 1 :][:NEW]
            missed = found.max(-1) - found[np.arange(NEW), row]
            assert missed.max() <= 4 * ROUNDING * np.abs(found).max()
