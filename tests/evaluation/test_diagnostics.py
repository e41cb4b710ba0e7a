"""What is measured inside mixers, against the same figures worked out by other means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.evaluation.diagnostics import PIECES, Diagnostics, summary
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec

TIME, WIDTH = 2 * PIECES, 32
BLOCKS = {
    "recur": {"mixer": {"kind": "gla", "heads": 2}},
    "attend": {"mixer": {"kind": "attention", "heads": 4, "position": {"kind": "none"}}},
    "both": {"mixer": {"kind": "hydra", "head_size": 16}},
    "only": {"mixer": None, "ffn": {"kind": "swiglu"}},
}


def measured(drawn, layout, change=lambda params: params):
    blocks = {name: BLOCKS[name] for name in layout}
    model = ModelSpec.model_validate({"width": WIDTH, "vocab_size": 17, "blocks": blocks, "layout": layout}).build()
    params = change(drawn(model))
    tokens = jax.random.randint(jax.random.key(1), (2, TIME), 0, 17)
    return model, params, tokens, Diagnostics(model).measure(params, tokens)


@pytest.fixture(scope="module")
def hybrid(drawn):
    return measured(drawn, ["recur", "attend", "both", "only"])


def test_each_layer_has_the_figures_that_its_mixer_has(hybrid):
    found = [set(figures) for figures in hybrid[3]]
    assert found == [{"state_norm", "state_maximum", "decay"}, {"attention_entropy"}, set(), set()]
    assert hybrid[3][0]["state_norm"].shape == (PIECES,)
    assert hybrid[3][1]["attention_entropy"].shape == (4,)


@pytest.mark.slow
def test_states_are_those_of_a_prefill(drawn):
    model, params, tokens, (figures, _) = measured(drawn, ["recur", "attend"])
    half = TIME // 2
    context = Context.rows(2, half)
    context = Context(context.positions, context.segment_ids, "prefill")
    _, caches, _ = model.hidden(params, tokens[:, :half], context, model.init_caches(2, TIME))
    state = np.asarray(caches["segment_0"]["layer_0"]["state"])[0]
    np.testing.assert_allclose(figures["state_norm"][PIECES // 2 - 1], np.sqrt(np.mean(state**2)), rtol=1e-4)
    largest = np.sqrt(np.mean(state**2, axis=0)).max()
    np.testing.assert_allclose(figures["state_maximum"][PIECES // 2 - 1], largest, rtol=1e-4)


def test_decay_lies_between_nothing_and_all(hybrid):
    least, mean, largest = hybrid[3][0]["decay"]
    assert 0 < least < mean < largest <= 1


def test_uniform_attention_has_the_entropy_of_a_uniform_choice(drawn):
    def without_queries(params):
        query = params["stack"]["segment_0"]["layer_0"]["mixer"]["inner"]["query"]
        query["weight"] = jnp.zeros_like(query["weight"])
        return params

    _, _, _, (figures,) = measured(drawn, ["attend"], without_queries)
    want = np.mean(np.log(np.arange(1, TIME + 1)))
    np.testing.assert_allclose(figures["attention_entropy"], want, rtol=1e-5)


def test_a_summary_names_layers(hybrid):
    row = summary(hybrid[3])
    assert set(row) == {
        "state_norm/layer_0", "state_maximum/layer_0", "decay/layer_0", "attention_entropy/layer_1"
    }  # fmt: skip
    assert all(np.isfinite(value) for value in row.values())
