"""Layers that take keys and values of earlier ones, in models with several streams and embeddings by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.validation import validate

WIDTH, TIME, VOCAB = 16, 24, 31
MIXER = {"kind": "attention", "heads": 4, "kv_heads": 2, "qk_norm": {"kind": "rmsnorm"}}
OWN = {**MIXER, "value_norm": {"kind": "rmsnorm", "scale": False}}
AROUND = {
    "norm_position": "sandwich", "laurel": {"rank": 4, "form": "averaged"}, "layer_input": {"size": 4, "scaled": True},
    "streams": {"kind": "altup", "count": 3, "active": 1},
}  # fmt: skip
FFN = {"kind": "geglu", "hidden": 16, "sparsity": 0.5}


def whole(**options):
    """Two kinds of layers twice, then one of each that takes the keys and values of the last of its kind."""
    blocks = {
        name: {"mixer": {**mixer, "window": window}, "ffn": FFN, **AROUND}
        for name, mixer, window in (
            ("local", OWN, 5), ("full", OWN, None),
            ("local_shared", {**MIXER, "shares_keys": True}, 5), ("full_shared", {**MIXER, "shares_keys": True}, None),
        )
    }  # fmt: skip
    layout = ["local", "full", "local", "full", "local_shared", "full_shared"]
    base = {"width": WIDTH, "vocab_size": VOCAB, "blocks": blocks, "layout": layout, "layer_embedding": {"size": 4}}
    return validate(ModelSpec, base | options, "model").build()


class Made:
    def __init__(self, bold):
        self.model = whole()
        self.params, self.ids = bold(self.model, 0.1), jax.random.randint(jax.random.key(7), (2, TIME), 0, VOCAB)
        self.run = jax.jit(lambda params, ids, context, caches: self.model.hidden(params, ids, context, caches)[:2])
        self.hidden, _ = self.run(self.params, self.ids, self.context(slice(0, TIME)), None)
        # Norms behind every half enlarge what is rounded: what one rounding of the parameters changes, four times.
        rounded = jax.tree.map(lambda leaf: np.nextafter(np.asarray(leaf), np.float32(np.inf)), self.params)
        moved, _ = self.run(rounded, self.ids, self.context(slice(0, TIME)), None)
        self.tolerance = 4 * float(jnp.abs(moved - self.hidden).max())
        assert self.tolerance < 1e-4 * float(jnp.abs(self.hidden).max())

    def context(self, piece, mode="train"):
        rows = Context.rows(2, TIME)
        return Context(rows.positions[:, piece], rows.segment_ids[:, piece], mode)


@pytest.fixture(scope="module")
def made(bold):
    return Made(bold)


def test_who_takes_from_whom(made):
    assert made.model.stack.sharing.sources == [None, None, None, None, 2, 3]
    assert [(len(part.period), part.repeats) for part in made.model.stack.segments] == [(2, 2), (1, 1), (1, 1)]
    shared = made.params["stack"]["segment_1"]["layer_0"]["mixer"]["inner"]
    assert set(shared) == {"query", "query_norm", "output"}


@pytest.mark.slow
def test_pieces_from_a_cache_are_the_whole_row(made):
    caches, found, start = made.model.init_caches(2, TIME), [], 0
    assert caches["segment_1"]["layer_0"] == caches["segment_2"]["layer_0"] == {}
    for length in (7, 8, 1, 1, 7):
        piece = slice(start, start + length)
        context = made.context(piece, "decode" if start else "prefill")
        hidden, caches = made.run(made.params, made.ids[:, piece], context, caches)
        found.append(hidden)
        start += length
    np.testing.assert_allclose(jnp.concatenate(found, 1), made.hidden, atol=made.tolerance)


def test_the_future_changes_nothing_before(made):
    changed = made.ids.at[:, 15:].set((made.ids[:, 15:] + 1) % VOCAB)
    after, _ = made.run(made.params, changed, made.context(slice(0, TIME)), None)
    np.testing.assert_allclose(after[:, :15], made.hidden[:, :15], atol=1e-6)
    assert np.abs(after[:, 15:] - made.hidden[:, 15:]).max() > 0.1


def test_documents_packed_together_are_as_if_alone(made):
    positions = jnp.array([[*range(9), *range(TIME - 9)]] * 2, jnp.int32)
    segments = jnp.array([[1] * 9 + [2] * (TIME - 9)] * 2, jnp.int32)
    ids = jnp.concatenate([made.ids[:, TIME - 9 :], made.ids[:, : TIME - 9]], 1)
    packed, _ = made.run(made.params, ids, Context(positions, segments), None)
    np.testing.assert_allclose(packed[:, 9:], made.hidden[:, : TIME - 9], atol=made.tolerance)


@pytest.mark.slow
def test_every_parameter_takes_part_and_nothing_hangs_on_the_scan(made):
    def slopes(model):
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(model.logits(params, made.ids)))))(made.params)

    found, others = slopes(made.model), slopes(whole(scan=False, remat="none"))
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(found))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()), found, others)


def test_what_a_scan_carries_from_one_repeat_to_the_next(bold):
    """Layers of unequal width fall into segments in which a layer takes what the repeat before has left."""
    own, shared = ({"mixer": m, "ffn": {"kind": "mlp"}} for m in (OWN, {**MIXER, "shares_keys": True}))
    own["ffn"] = {"kind": "mlp", "hidden": [8, 16, 16, 16]}
    base = {"width": WIDTH, "vocab_size": VOCAB, "blocks": {"own": own, "shared": shared}}
    model, unrolled = (
        validate(ModelSpec, {**base, "layout": ["own", "shared"], "repeats": 4, "scan": scan}, "model").build()
        for scan in (True, False)
    )
    assert [(len(part.period), part.repeats) for part in model.stack.segments] == [(1, 1), (2, 3), (1, 1)]
    assert model.stack.sharing.sources == [None, 0, None, 2, None, 4, None, 6]
    params, ids = bold(model), jax.random.randint(jax.random.key(1), (1, TIME), 0, VOCAB)
    want = jax.jit(unrolled.logits)(params, ids)
    np.testing.assert_allclose(jax.jit(model.logits)(params, ids), want, atol=1e-5 * float(jnp.abs(want).max()))


def test_flops_are_those_of_the_compiled_program():
    blocks = {
        name: {
            "mixer": {**MIXER, "shares_keys": taking, "implementation": "reference"},
            "ffn": {"kind": "reglu", "hidden": 512}, "laurel": {"rank": 64}, "layer_input": {"size": 64},
            "streams": {"kind": "altup", "count": 4},
        }
        for name, taking in (("own", False), ("shared", True))
    }  # fmt: skip
    values = {
        "width": 256, "vocab_size": 64, "blocks": blocks, "layout": ["own", "shared"], "scan": False, "remat": "none",
        "layer_embedding": {"size": 64},
    }  # fmt: skip
    model = validate(ModelSpec, values, "model").build()
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    program = jax.jit(lambda params, tokens: model.logits(params, tokens)).lower(params, tokens).compile()
    assert program.cost_analysis()["flops"] == pytest.approx(64 * model.flops_per_token(64), rel=0.05)


FAULTS = [
    (
        {"layout": ["local", "full_shared", "full", "local_shared"]},
        "full_shared.mixer.shares_keys: no layer before",
    ),
    ({"layer_embedding": None}, "model.blocks.local.layer_input: the model has no embeddings of each layer's own"),
    ({"layer_embedding": {"size": 8}}, "model.layer_embedding.size: 8, but model.blocks.local.layer_input has 4"),
    ({"exits": {"layers": [1]}}, "model.exits: heads read one residual stream, and blocks have several"),
]


@pytest.mark.parametrize(("changes", "words"), FAULTS)
def test_faults(changes, words):
    with pytest.raises(ConfigError) as error:
        whole(**changes)
    assert words in str(error.value)


def with_depth(layout):
    plain, depth = {"mixer": OWN}, {"kind": "mixture_of_depths", "capacity": 0.5}
    blocks = {"own": plain, "deep": plain | {"depth": depth}, "shared": {"mixer": {**MIXER, "shares_keys": True}}}
    return validate(ModelSpec, {"width": WIDTH, "vocab_size": VOCAB, "blocks": blocks, "layout": layout}, "model")


def test_layers_that_tokens_pass_by_hand_nothing_on():
    """Their keys are of the tokens that ran them, and between layers that every token runs they are no one's."""
    model = with_depth(["own", "deep", "deep", "own", "shared"]).build()
    assert model.stack.sharing.sources[4] == 3
    assert [name is not None for name in model.stack.sharing.hands_on] == [True, False, False, True, False]
    ids = jnp.zeros((1, TIME), jnp.int32)
    assert jax.eval_shape(lambda: model.logits(model.init(jax.random.key(0)), ids)).shape == (1, TIME, VOCAB)
    with pytest.raises(ConfigError, match=r"blocks.deep.depth: layer 2 takes the keys and values of layer 1: no token"):
        with_depth(["own", "deep", "shared"])


def test_blocks_have_the_same_streams():
    spec = whole().spec.dump()
    spec["blocks"]["full"]["streams"] = None
    with pytest.raises(ConfigError, match=r"blocks.full.streams: all blocks have the same, and 'local' has others"):
        validate(ModelSpec, spec, "model")
