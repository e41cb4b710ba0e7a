"""Mixture of depths: against a loop over rows, at its limits, in a cache, counted, and refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.block import BlockSpec
from efficient_lm.models.computed import computed
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.parameters import Blueprint, Initialization
from efficient_lm.validation import validate

WIDTH, TIME = 16, 24
BLOCK = {"mixer": {"kind": "attention", "heads": 2}, "ffn": {"kind": "swiglu", "hidden": 24}}


def spec_of(block=BLOCK, **rule):
    return validate(BlockSpec, {**block, "depth": {"kind": "mixture_of_depths", "capacity": 0.25, **rule}})


@pytest.fixture
def built(bold):
    """``built(spec)`` → a block's blueprint, and parameters that all matter."""

    def make(spec):
        blueprint = Blueprint(lambda: spec.build(WIDTH, Initialization()))
        return blueprint, bold(blueprint)

    return make


def packed():
    """Two rows: documents of 10 and 9 tokens and 5 of padding; one document of 4 and 20 of padding."""
    segments = np.array([[1] * 10 + [2] * 9 + [0] * 5, [0] * 20 + [3] * 4], np.int32)
    positions = np.array([[*range(10), *range(9), *[0] * 5], [*[0] * 20, *range(4)]], np.int32)
    return Context(jnp.asarray(positions), jnp.asarray(segments), record=True)


def stream(rows=2, key=5):
    return jax.random.normal(jax.random.key(key), (rows, TIME, WIDTH))


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def scores_of(params, x):
    """``W_r norm(x) + b`` in float64, ``[rows, time]``."""
    depth, x = float64(params["depth"]), np.asarray(x, np.float64)
    normed = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * depth["norm"]["scale"]
    return normed @ depth["router"]["weight"] + depth["router"]["bias"]


def sigmoid(scores):
    return 1 / (1 + np.exp(-scores))


def tanh_norm(scores):
    return 1 + 0.2 * np.tanh(scores)


TANH_NORM = {"weight": "tanh", "weight_scale": 0.2, "weight_offset": 1.0}


@pytest.mark.quick_for("rule0-sigmoid-ones_like")
@pytest.mark.parametrize(
    ("rule", "weight", "passing"),
    [
        ({}, sigmoid, np.ones_like),
        ({"weight": "identity", "kept_tokens": 1}, lambda scores: scores, np.ones_like),
        ({**TANH_NORM, "symmetric": True}, tanh_norm, tanh_norm),
    ],
)
def test_equal_to_a_loop_over_rows_and_documents(rule, weight, passing, built):
    spec = spec_of(**rule)
    blueprint, params = built(spec)
    x, context = stream(), packed()
    y, _, auxiliary = jax.jit(lambda params, x: blueprint(params)(x, context))(params, x)
    plain = Blueprint(lambda: spec.model_copy(update={"depth": None}).build(WIDTH, Initialization()))
    own = {name: part for name, part in params.items() if name != "depth"}
    run = jax.jit(lambda x, where: plain(own)(x, where)[0])
    scores = scores_of(params, x)
    expected, ran = np.asarray(x, np.float64), np.zeros((2, TIME), bool)
    for row in range(2):
        segments, positions = np.asarray(context.segment_ids)[row], np.asarray(context.positions)[row]
        real = np.flatnonzero(segments)
        expected[row, real] *= passing(scores[row, real])[:, None]
        first = positions < spec.depth.kept_tokens
        ranked = sorted(real, key=lambda i, row=row, first=first: (not first[i], -scores[row, i]))
        ran[row, ranked[: round(0.25 * TIME)]] = True
        for document in set(segments[real]):
            places = np.flatnonzero(ran[row] & (segments == document))
            if not len(places):
                continue
            where = Context(jnp.asarray(positions[None, places]), jnp.ones((1, len(places)), jnp.int32), packed=False)
            part = np.asarray(x, np.float64)[row, places]
            changed = np.asarray(run(x[row : row + 1, places], where), np.float64)[0] - part
            expected[row, places] = part + weight(scores[row, places])[:, None] * changed
    np.testing.assert_array_equal(auxiliary.observed["ran"], ran)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)
    if not spec.depth.symmetric:
        np.testing.assert_array_equal(np.asarray(y)[~ran], np.asarray(x)[~ran])


@pytest.mark.parametrize("rule", [{"weight": "none", "decide": "router"}, {**TANH_NORM, "weight_scale": 1e-9}])
def test_whole_capacity_and_unit_weights_are_the_plain_block(rule, built):
    spec = spec_of(capacity=1.0, **rule)
    blueprint, params = built(spec)
    plain = Blueprint(lambda: spec.model_copy(update={"depth": None}).build(WIDTH, Initialization()))
    own = {name: part for name, part in params.items() if name != "depth"}

    @jax.jit
    def both(x):
        return blueprint(params)(x, packed())[0], plain(own)(x, packed())[0]

    real = np.asarray(packed().segment_ids) != 0
    routed, whole = (np.asarray(y)[real] for y in both(stream()))
    np.testing.assert_allclose(routed, whole, rtol=1e-6, atol=1e-6)


def test_gradients_reach_the_router_and_end_before_the_stream_at_the_predictor(built):
    blueprint, params = built(spec_of(decision_loss=1.0))

    @jax.jit
    def gradients(params, x):
        def through_block(params, x):
            return jnp.sum(jnp.sin(blueprint(params)(x, packed())[0]))

        def through_loss(params, x):
            return blueprint(params)(x, packed())[2].losses["depth_router"]

        return jax.grad(through_block)(params, x), jax.grad(through_loss, argnums=(0, 1))(params, x)

    of_block, (of_loss, of_stream) = gradients(params, stream())
    assert np.abs(of_block["depth"]["router"]["weight"]).max() > 1e-3
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_block["depth"]["predictor"]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(of_loss["depth"]["predictor"]))
    assert not np.any(of_stream) and not np.any(of_loss["depth"]["router"]["weight"])


def test_padding_has_no_part(built):
    """What padding holds changes nothing, and it is left as it is; figures and the loss are of real tokens."""
    blueprint, params = built(spec_of(decide="router", decision_loss=1.0))
    context, x = packed(), stream()
    padding = context.segment_ids[..., None] == 0
    run = jax.jit(lambda x: blueprint(params)(x, context))
    y, _, auxiliary = run(x)
    other, _, other_auxiliary = run(jnp.where(padding, 50.0, x))
    np.testing.assert_array_equal(jnp.where(padding, 0, y), jnp.where(padding, 0, other))
    np.testing.assert_array_equal(np.asarray(other)[np.asarray(context.segment_ids) == 0], 50.0)
    jax.tree.map(np.testing.assert_array_equal, auxiliary, other_auxiliary)
    scores, real = scores_of(params, x), np.asarray(context.segment_ids) != 0
    ran, wanted = np.asarray(auxiliary.observed["ran"]), scores > 0
    assert auxiliary.observed["depth_accuracy"] == pytest.approx((wanted == ran)[real].mean())
    assert auxiliary.observed["depth_share"] == pytest.approx(wanted[real].mean())
    entropy = np.where(ran, np.logaddexp(0, -scores), np.logaddexp(0, scores))[real].mean()
    assert auxiliary.losses["depth_router"] == pytest.approx(entropy, rel=1e-5)
    assert not ran[~real].any()


@pytest.fixture
def model_of(drawn):
    """``model_of(mixer, repeats=2, **rule)`` → a model and its parameters."""

    def make(mixer, repeats=2, **rule):
        model = _model(mixer, repeats, rule)
        return model, drawn(model, seed=3)

    return make


def _model(mixer, repeats, rule):
    block = {"mixer": mixer, "ffn": {"kind": "mlp", "hidden": 24}}
    rule = {"kind": "mixture_of_depths", "capacity": 0.3, "every": 2, "decide": "router", **rule}
    blocks = {"layer": {**block, "depth": rule}}
    values = {"width": WIDTH, "vocab_size": 19, "blocks": blocks, "layout": ["layer"], "repeats": repeats}
    return validate(ModelSpec, {**values, "init_std": 0.5, "embedding_std": 1.0}).build()


def in_pieces(model, params, tokens, context, prompt):
    """Logits of a prompt and then of token after token, from a cache for the row's length."""
    caches = model.init_caches(*tokens.shape)

    @jax.jit
    def step(caches, tokens, context):
        hidden, caches, auxiliary = model.hidden(params, tokens, context, caches)
        return model.logits_from(params, hidden), caches, auxiliary.observed

    def part(start, stop, mode):
        ids = context.segment_ids[:, start:stop]
        return tokens[:, start:stop], replace(context, positions=context.positions[:, start:stop], segment_ids=ids,
                                              mode=mode)  # fmt: skip

    logits, caches, _ = step(caches, *part(0, prompt, "prefill"))
    found = [logits]
    for place in range(prompt, tokens.shape[1]):
        logits, caches, _ = step(caches, *part(place, place + 1, "decode"))
        found.append(logits)
    return jnp.concatenate(found, axis=1), caches


MIXERS = [
    {"kind": "attention", "heads": 2, "window": 5, "kept_tokens": 1, "position": {"kind": "alibi"}},
    {"kind": "mamba2", "state_size": 8, "head_size": 8},
    {"kind": "multi_latent", "heads": 2, "head_size": 8, "latent_size": 8, "rotary_size": 4, "window": 6},
    {"kind": "rg_lru"},
]


@pytest.mark.quick_for("attention")
@pytest.mark.parametrize(
    "mixer",
    [pytest.param(mixer, id=mixer["kind"], marks=[pytest.mark.slow] * (mixer["kind"] == "rg_lru")) for mixer in MIXERS],
)
def test_a_cache_gives_what_rows_with_decisions_of_their_own_give(mixer, model_of):
    model, params = model_of(mixer, selection="causal")
    tokens = jax.random.randint(jax.random.key(1), (2, TIME), 0, 19)
    segments = jnp.asarray([[1] * TIME, [0] * 6 + [1] * (TIME - 6)], jnp.int32)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    context = Context(positions, segments)
    whole, observed = jax.jit(
        lambda params: (
            model.logits(params, tokens, context),
            model.hidden(params, tokens, replace(context, record=True))[2].observed,
        )
    )(params)
    ran = np.asarray(observed["segment_1"]["layer_0"]["ran"])[0]
    assert 0.1 < ran.mean() < 0.9
    pieces, caches = in_pieces(model, params, tokens, context, 9)
    live = np.asarray(segments)[..., None] != 0
    np.testing.assert_allclose(np.where(live, pieces, 0), np.where(live, whole, 0), rtol=2e-4, atol=2e-4)
    left = np.asarray(caches["segment_1"]["layer_0"]["left"])[0]
    np.testing.assert_array_equal(left, model.layers[1].depth.budget(TIME) - ran.sum(axis=1))


@pytest.mark.slow
def test_decoding_is_top_k_where_decisions_are_membership(model_of):
    """With a router's bias between the scores of the k-th token and the next, decisions and top-k are the same."""
    model, params = model_of(BLOCK["mixer"])
    causal = validate(ModelSpec, model.spec.dump()).decided("causal").build()
    tokens = jax.random.randint(jax.random.key(1), (1, TIME), 0, 19)
    context = Context.rows(1, TIME)
    layer = params["stack"]["segment_1"]["layer_0"]
    first = jax.tree.map(lambda leaf: leaf[0], params["stack"]["segment_0"]["layer_0"])
    x = model.embedding(params["embedding"])(tokens, context.positions, jnp.float32)
    x = model.stack.periods[0][0](first)(x, context)[0]
    ranked = np.sort(scores_of(jax.tree.map(lambda leaf: leaf[0], layer), x)[0])[::-1]
    count = round(0.3 * TIME)
    layer["depth"]["router"]["bias"] -= (ranked[count - 1] + ranked[count]) / 2
    whole = jax.jit(model.logits)(params, tokens)
    pieces, _ = in_pieces(model, params, tokens, context, 7)
    np.testing.assert_allclose(pieces, whole, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.jit(causal.logits)(params, tokens), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_full_cache_lets_tokens_pass(model_of):
    model, params = model_of(BLOCK["mixer"], capacity=0.05, slack=0.0, selection="causal")
    time, budget = 48, 3 + 32
    assert model.layers[1].depth.budget(time) == budget
    layer = params["stack"]["segment_1"]["layer_0"]
    layer["depth"]["router"]["bias"] += 100.0
    tokens = jax.random.randint(jax.random.key(1), (1, time), 0, 19)
    context = replace(Context.rows(1, time), record=True, packed=True)

    @jax.jit
    def run(params):
        hidden, _, auxiliary = model.hidden(params, tokens, context)
        return model.logits_from(params, hidden), auxiliary.observed

    whole, observed = run(params)
    ran = np.asarray(observed["segment_1"]["layer_0"]["ran"])[0, 0]
    np.testing.assert_array_equal(ran, np.arange(time) < budget)
    pieces, caches = in_pieces(model, params, tokens, context, 30)
    np.testing.assert_allclose(pieces, whole, rtol=1e-4, atol=1e-4)
    cache = caches["segment_1"]["layer_0"]
    assert cache["left"].tolist() == [[0]] and cache["block"]["key"].shape[2] == budget


def test_a_window_reaches_over_passing_tokens_by_position(built):
    """Of two selected tokens far apart, neither sees the other through a window, though they are neighbours."""
    spec = spec_of({"mixer": {"kind": "attention", "heads": 1, "window": 4}}, capacity=2 / TIME, weight="identity")
    blueprint, params = built(spec)
    params["depth"]["norm"]["scale"] = jnp.ones(WIDTH)
    params["depth"]["router"]["weight"] = jnp.zeros(WIDTH).at[0].set(10.0)
    base = stream(1).at[..., 0].set(-1.0).at[0, 20, 0].set(3.0)
    run = jax.jit(lambda x: blueprint(params)(x, Context.rows(1, TIME))[0])

    def late(place, value):
        return run(base.at[0, place].set(value).at[0, place, 0].set(3.0))[0, 20]

    np.testing.assert_array_equal(late(4, 1.0), late(4, -1.0))
    assert np.abs(late(18, 1.0) - late(18, -1.0)).max() > 1e-3


def test_flops_are_those_of_the_compiled_program():
    block = {
        "mixer": {"kind": "attention", "heads": 4, "implementation": "reference"},
        "ffn": {"kind": "mlp", "hidden": 1024, "activation": "relu"},
    }
    values = {"width": 256, "vocab_size": 64, "layout": ["layer"], "repeats": 4, "scan": False, "remat": "none"}

    def compiled_and_counted(**rule):
        depth = {"kind": "mixture_of_depths", "every": 2, **rule} if rule else None
        model = validate(ModelSpec, {**values, "blocks": {"layer": {**block, "depth": depth}}}).build()
        params = jax.eval_shape(model.init, jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
        program = jax.jit(lambda params, tokens: model.logits(params, tokens)).lower(params, tokens).compile()
        return program.cost_analysis()["flops"], 64 * model.flops_per_token(64)

    dense, routed = compiled_and_counted(), compiled_and_counted(capacity=0.125)
    assert routed[0] < 0.65 * dense[0]
    for compiled, counted in (dense, routed):
        assert abs(counted / compiled - 1) < 0.05
    assert abs((dense[1] - routed[1]) / (dense[0] - routed[0]) - 1) < 0.05


@pytest.mark.parametrize("capacity", [0.25, 1.0])
def test_what_was_computed_is_what_the_spec_counts(capacity):
    """Routers, predictors, attention among the tokens that ran, and what is beside the layers and in front of them."""
    depth = {"kind": "mixture_of_depths", "capacity": capacity}
    blocks = {"layer": {**BLOCK, "depth": depth}, "every": {**BLOCK, "layer_input": {"size": 4}}}
    values = {"width": WIDTH, "vocab_size": 31, "blocks": blocks, "layout": ["layer", "every"]}
    model = validate(ModelSpec, {**values, "layer_embedding": {"size": 4}}, "model").build()
    ran = 5 * TIME * np.array([[capacity, 1.0]] * 2)
    found = computed(model, None, ran, 5 * TIME, TIME)
    assert found.flops == pytest.approx(5 * TIME * model.flops_per_token(TIME))
    assert (found.flops < found.full_flops) == (capacity < 1)


def layers_of(repeats=4, **rule):
    spec = {"width": 16, "blocks": {"layer": {**BLOCK, "depth": {"kind": "mixture_of_depths", **rule}}},
            "layout": ["layer"], "repeats": repeats}  # fmt: skip
    return [layer.depth and layer.depth.capacity for layer in validate(ModelSpec, spec, "model").layers()]


def test_capacity_by_layer():
    assert layers_of(capacity=0.5, every=2) == [None, 0.5, None, 0.5]
    assert layers_of(capacity=[0.5, 0.25], every=2) == [None, 0.5, None, 0.25]
    assert layers_of(capacity=0.5, every=3) == [None, None, 0.5, None]
    assert layers_of(capacity={"start": 1, "end": 0.1}) == pytest.approx([1, 0.7, 0.4, 0.1])
    decay = layers_of(5, capacity={"center": 0.6, "least": 0.2, "most": 1})
    assert decay == pytest.approx([1, 0.6 + 0.5 * np.cos(np.pi / 4), 0.6, 0.6 - 0.5 * np.cos(np.pi / 4), 0.2])


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"capacity": 0}, "depth.capacity: expected a number above 0"),
        ({"capacity": -0.5}, "depth.capacity: expected a number above 0"),
        ({"capacity": 1.5}, "depth.capacity: expected at most 1"),
        ({"capacity": {"center": 0.5, "amplitude": 0.6}}, "depth.capacity: 1.1 is outside (0, 1]; bound the schedule"),
        ({"capacity": [0.5, 0.5, 0.5]}, "'capacity' lists 3 values, but 4 layers use it"),
        ({"capacity": {"middle": 0.5}}, "a mapping with 'start' and 'end' or with 'center'"),
        ({"every": 5}, "depth.every: 5, but only 4 layers have the block: at most 4"),
        ({"weight": "none"}, "depth.weight: none gives the router no gradient"),
        ({"weight": "none", "decide": "router", "symmetric": True}, "depth.symmetric: weight: none weights nothing"),
        ({"kind": "mixture_of_depth"}, "did you mean 'mixture_of_depths'"),
    ],
)
def test_faults_of_the_rule(rule, said):
    with pytest.raises(ConfigError) as caught:
        layers_of(**rule)
    assert said in str(caught.value) and str(caught.value).startswith("model.blocks.layer")


@pytest.mark.parametrize(
    ("kind", "said"), [("hydra", "'hydra' sees later tokens"), ("native_sparse", "'native_sparse' counts on neighbour")]
)
def test_mixers_that_it_cannot_wrap(kind, said):
    blocks = {"layer": {"mixer": {"kind": kind}, "depth": {"kind": "mixture_of_depths"}}}
    with pytest.raises(ConfigError, match=f"model.blocks.layer.mixer: depth 'mixture_of_depths': {said}"):
        validate(ModelSpec, {"width": 64, "blocks": blocks, "layout": ["layer"]}, "model")


def test_no_rule_by_name_is_no_rule():
    assert validate(BlockSpec, {**BLOCK, "depth": {"kind": "none"}}) == validate(BlockSpec, BLOCK)
