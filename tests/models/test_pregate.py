"""The router in front of the layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec

TIME, VOCAB = 14, 31
FFN = {"kind": "moe", "experts": 4, "top_k": 2, "expert": {"kind": "mlp", "hidden": 8}, "router": {"pregated": True}}
BLOCK = {"mixer": {"kind": "attention", "heads": 2}, "ffn": {"kind": "mlp", "hidden": 8}}
GATES = {
    "linear": {"experts": 4},
    "attention": {"experts": 4, "width": 8, "block": BLOCK},
    "recurrence": {"experts": 4, "block": {"mixer": {"kind": "gla", "heads": 2}}},
}


def values(gate, ffn=FFN, **options):
    block = {"mixer": {"kind": "attention", "heads": 2}, "ffn": ffn}
    base = {"width": 16, "vocab_size": VOCAB, "blocks": {"layer": block}, "layout": ["layer"], "repeats": 2}
    return {**base, **({"pregate": gate} if gate else {}), **options}


class Made:
    """A model, parameters that all matter, and its logits of two rows."""

    def __init__(self, bold, gate):
        self.model = ModelSpec.model_validate(values(gate)).build()
        self.params = bold(self.model)
        self.tokens = jax.random.randint(jax.random.key(7), (2, TIME), 0, VOCAB)
        self.run = jax.jit(lambda params, tokens, context, caches: self.model.hidden(params, tokens, context, caches))
        self.hidden, _, self.auxiliary = self.run(self.params, self.tokens, self.context(slice(0, TIME)), None)

    def context(self, piece, mode="train"):
        rows = Context.rows(2, TIME)
        return Context(rows.positions[:, piece], rows.segment_ids[:, piece], mode, record=True)


@pytest.fixture(scope="module", params=GATES)
def made(request, bold):
    return Made(bold, GATES[request.param])


@pytest.mark.quick_for("attention")
def test_pieces_from_a_cache_are_the_whole_row(made):
    caches, found, start = made.model.init_caches(2, TIME), [], 0
    for length in (11, 1, 1, 1):
        piece = slice(start, start + length)
        context = made.context(piece, "decode" if start else "prefill")
        hidden, caches, _ = made.run(made.params, made.tokens[:, piece], context, caches)
        found.append(hidden)
        start += length
    np.testing.assert_allclose(jnp.concatenate(found, 1), made.hidden, atol=2e-5 * float(jnp.abs(made.hidden).max()))


def test_the_future_changes_nothing_before(made):
    changed = made.tokens.at[:, 9:].set((made.tokens[:, 9:] + 1) % VOCAB)
    after, _, _ = made.run(made.params, changed, made.context(slice(0, TIME)), None)
    np.testing.assert_allclose(after[:, :9], made.hidden[:, :9], atol=1e-5)
    assert np.abs(after[:, 9:] - made.hidden[:, 9:]).max() > 0.1


def test_every_layer_takes_the_same_experts(made):
    routes = made.auxiliary.observed["segment_0"]["layer_0"]["routes"]
    np.testing.assert_array_equal(routes[0], routes[1])
    assert len(np.unique(routes)) == 4
    # The layers' own parameters have no part in the choice.
    other = {**made.params, "stack": jax.tree.map(lambda leaf: leaf * 1.5, made.params["stack"])}
    again = made.run(other, made.tokens, made.context(slice(0, TIME)), None)[2]
    np.testing.assert_array_equal(again.observed["segment_0"]["layer_0"]["routes"], routes)


@pytest.mark.slow
def test_every_parameter_has_a_gradient(bold):
    made = Made(bold, GATES["attention"])
    loss = jax.jit(jax.grad(lambda params: jnp.sum(made.model.logits(params, made.tokens) ** 2)))
    gradients = loss(made.params)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradients["pregate"]))
    assert jax.tree.structure(made.params) == jax.tree.structure(
        jax.tree.map(lambda d: 0, made.model.declarations, is_leaf=lambda d: hasattr(d, "axes"))
    )


def test_documents_packed_together_choose_as_if_alone(bold):
    made = Made(bold, GATES["attention"])
    segments = jnp.array([[1] * 5 + [2] * 9] * 2, jnp.int32)
    positions = jnp.array([[*range(5), *range(9)]] * 2, jnp.int32)
    packed, _, _ = made.run(made.params, made.tokens, Context(positions, segments, record=True), None)
    np.testing.assert_allclose(packed[:, :5], made.hidden[:, :5], atol=2e-5 * float(jnp.abs(made.hidden).max()))
    alone, _, _ = made.run(made.params, made.tokens[:, 5:], made.context(slice(0, 9)), None)
    np.testing.assert_allclose(packed[:, 5:], alone, atol=2e-5 * float(jnp.abs(alone).max()))


def test_flops_count_the_router():
    def flops(gate, ffn):
        return ModelSpec.model_validate(values(gate, ffn)).build().flops_per_token(TIME)

    routers = 2 * 2 * 16 * 4
    own = flops(None, {**FFN, "router": {}})
    assert flops({"experts": 4}, FFN) == pytest.approx(own - routers + 2 * 16 * 4)
    narrow = {"experts": 4, "width": 8}
    assert flops(narrow, FFN) == pytest.approx(own - routers + 2 * 16 * 8 + 2 * 8 * 4)


FAULTS = [
    (None, FFN, "model.blocks.layer.ffn.router.pregated: the model has no router in front"),
    ({"experts": 8}, FFN, "model.pregate.experts: 8, but the ffn of model.blocks.layer has 4"),
    ({"experts": 4}, {"kind": "mlp"}, "model.pregate: no block reads its scores"),
    (
        {"experts": 4, "block": {"mixer": {"kind": "hydra", "head_size": 8}}},
        FFN,
        "model.pregate.block.mixer: 'hydra' sees later tokens",
    ),
    ({"experts": 4, "block": {**BLOCK, "ffn": FFN}}, FFN, "model.pregate.block.ffn: .*take a dense kind, not 'moe'"),
    ({"experts": 4, "width": 9, "block": BLOCK}, FFN, "model.pregate.block.mixer.heads: 2 heads do not divide width 9"),
]


@pytest.mark.parametrize(("gate", "ffn", "words"), FAULTS, ids=[fault[2][:40] for fault in FAULTS])
def test_faults(gate, ffn, words):
    with pytest.raises(ConfigError, match=words):
        ModelSpec.model_validate(values(gate, ffn))
