"""Properties of whole models: causality, packing, decoding, scanning, rematerialisation, segments, faults."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from efficient_lm.errors import ConfigError
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.parameters import count_parameters, decay_mask, parameter_table

VOCAB, TIME = 61, 24


def spec(mixer=None, ffn=None, **options):
    mixer = {"kind": "attention", "heads": 4, "kv_heads": 2, **(mixer or {})}
    block = {"mixer": mixer, "ffn": ffn or {"kind": "swiglu"}, **options.pop("block", {})}
    base = {"width": 32, "vocab_size": VOCAB, "blocks": {"layer": block}, "layout": ["layer"], "repeats": 2}
    return ModelSpec.model_validate({**base, **options})


def logits_of(model, params, ids, *args, **options):
    return jax.jit(lambda params, ids: model.logits(params, ids, *args, **options))(params, ids)


def tokens(batch=2, time=TIME, key=7):
    return jax.random.randint(jax.random.key(key), (batch, time), 0, VOCAB)


def assert_close(got, want, tolerance=1e-5):
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(got, want, atol=tolerance * float(np.abs(want).max()))


ENCODINGS = {
    "rotary": {}, "partial": {"position": {"kind": "rotary", "fraction": 0.5}},
    "alibi": {"position": {"kind": "alibi"}},
    "relative_bias": {"position": {"kind": "relative_bias", "buckets": 8, "max_distance": 16}},
    "none": {"position": {"kind": "none"}}, "learned": {"position": {"kind": "none"}},
}  # fmt: skip
REACH = {
    "full": {}, "window": {"window": 5}, "window_and_kept": {"window": 5, "kept_tokens": 2},
    "sinks": {"sink_logit": True},
    "window_of_one": {"window": 1}, "softcap_and_norm": {"softcap": 3.0, "qk_norm": {"kind": "rmsnorm"}},
}  # fmt: skip
CASES = [(encoding, "full") for encoding in ENCODINGS] + [("rotary", reach) for reach in REACH if reach != "full"]
CASES += [("relative_bias", "window_and_kept"), ("learned", "window"), ("alibi", "window_and_kept")]


def model_for(encoding, reach):
    options = {"learned_positions": 64} if encoding == "learned" else {}
    return spec({**ENCODINGS[encoding], **REACH[reach]}, **options).build()


@pytest.mark.quick_for("rotary-window", "alibi-window_and_kept", "relative_bias-full", "learned-full", "rotary-sinks")
@pytest.mark.parametrize(("encoding", "reach"), CASES)
def test_prefill_and_decoding_equal_the_full_pass(encoding, reach, bold):
    model = model_for(encoding, reach)
    params, ids, rows = bold(model), tokens(), Context.rows(2, TIME)
    want = logits_of(model, params, ids)
    caches, pieces, start = model.init_caches(2, TIME), [], 0
    run = jax.jit(lambda params, ids, context, caches: model.hidden(params, ids, context, caches)[:2])
    # A prefill, a longer piece than any window, single tokens, and a piece again.
    for length in (7, 8, 1, 1, 1, 6):
        piece = slice(start, start + length)
        mode = "decode" if start else "prefill"
        context = Context(rows.positions[:, piece], rows.segment_ids[:, piece], mode)
        hidden, caches = run(params, ids[:, piece], context, caches)
        pieces.append(model.logits_from(params, hidden))
        start += length
    assert_close(jnp.concatenate(pieces, 1), want)


@pytest.mark.quick_for("rotary-window", "alibi-full", "relative_bias-window_and_kept", "learned-window")
@pytest.mark.parametrize(("encoding", "reach"), CASES)
def test_a_packed_document_is_as_if_alone(encoding, reach, bold):
    model = model_for(encoding, reach)
    params, ids = bold(model), tokens(1)
    lengths = [1, 10, 9]
    segments = jnp.concatenate([jnp.full(n, i + 1) for i, n in enumerate(lengths)] + [jnp.zeros(4, int)])[None]
    positions = jnp.concatenate([jnp.arange(n) for n in lengths] + [jnp.zeros(4, int)])[None]
    packed = logits_of(model, params, ids, Context(positions.astype(jnp.int32), segments.astype(jnp.int32)))
    assert np.all(np.isfinite(packed))
    start = 0
    for length in lengths:
        assert_close(packed[:, start : start + length], logits_of(model, params, ids[:, start : start + length]))
        start += length


@pytest.mark.parametrize("reach", REACH)
def test_the_future_changes_nothing_before(reach, bold):
    model = model_for("rotary", reach)
    params, ids = bold(model), tokens()
    changed = ids.at[:, 15:].set((ids[:, 15:] + 1) % VOCAB)
    before, after = logits_of(model, params, jnp.stack([ids, changed]).reshape(-1, TIME)).reshape(2, 2, TIME, VOCAB)
    np.testing.assert_allclose(before[:, :15], after[:, :15], atol=1e-6)
    assert np.abs(before[:, 15:] - after[:, 15:]).max() > 0.1


def test_a_window_forgets_and_kept_tokens_do_not(bold):
    reached = {}
    for name in ("window", "window_and_kept"):
        model = spec(REACH[name], repeats=1).build()
        params, ids = bold(model), tokens(1)
        changed = ids.at[:, 0].set((ids[:, 0] + 1) % VOCAB)
        reached[name] = np.ptp(logits_of(model, params, jnp.concatenate([ids, changed])), axis=0)[-1].max()
    assert reached["window"] == 0 and reached["window_and_kept"] > 1e-3


def loss_and_gradient(model, params, ids):
    def loss(params):
        logits = jax.nn.log_softmax(model.logits(params, ids))
        return -jnp.mean(jnp.take_along_axis(logits[:, :-1], ids[:, 1:, None], -1))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.quick_for("changed0", "changed1")
@pytest.mark.parametrize("changed", [{"scan": False}, {"remat": "full"}, {"remat": "dots"}, {"remat": "names"}])
def test_scan_and_rematerialisation_change_nothing(changed, bold):
    plain, other = (spec(repeats=3, **{"remat": "none"} | options).build() for options in ({}, changed))
    params, ids = bold(plain), tokens()
    want_loss, want = loss_and_gradient(plain, params, ids)
    loss, got = loss_and_gradient(other, params, ids)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    jax.tree.map(lambda g, w: assert_close(g, w, 2e-5), got, want)


def saved_bytes(**options):
    model = spec(repeats=4, **options).build()
    params, ids = jax.eval_shape(model.init, jax.random.key(0)), jax.ShapeDtypeStruct((4, 64), jnp.int32)
    gradient = jax.jit(jax.grad(lambda params, ids: model.logits(params, ids).sum()))
    return gradient.lower(params, ids).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_rematerialisation_saves_memory():
    everything, named, full = (saved_bytes(remat=remat) for remat in ("none", "names", "full"))
    assert full < named < everything


def equations(jaxpr):
    inner = [value for eqn in jaxpr.eqns for value in jaxprs_in_params(eqn.params)]
    return len(jaxpr.eqns) + sum(equations(part) for part in inner)


def test_the_program_does_not_grow_with_depth():
    def size(repeats):
        model = spec(repeats=repeats).build()
        params = jax.eval_shape(model.init, jax.random.key(0))
        return equations(jax.make_jaxpr(jax.grad(lambda p: model.logits(p, tokens()).sum()))(params).jaxpr)

    assert size(48) == size(6)


def test_layers_fall_into_segments():
    local, full = {"mixer": {"kind": "attention", "window": 4}}, {"mixer": {"kind": "attention"}}
    layout = ["local"] * 5 + ["full"]
    model = spec(blocks={"local": local, "full": full}, layout=layout * 3 + ["local"] * 2, repeats=1).build()
    assert [(len(part.period), part.repeats, part.start) for part in model.stack.segments] == [(6, 3, 0), (1, 2, 18)]
    assert jax.eval_shape(model.init, jax.random.key(0))["stack"]["segment_0"]["layer_5"]["mixer"]["inner"]["query"][
        "weight"
    ].shape == (3, 32, 1, 32)


def test_parameters_do_not_depend_on_segments():
    def query(window):
        params = jax.jit(spec({"window": window}).build().init)(jax.random.key(0))
        weights = [part["layer_0"]["mixer"]["inner"]["query"]["weight"] for part in params["stack"].values()]
        return np.concatenate(weights)

    np.testing.assert_array_equal(query([4, 4]), query([4, 8]))


def test_values_vary_with_depth():
    listed = spec({"window": [4, None]}).layers()
    assert [layer.mixer.window for layer in listed] == [4, None]
    ramp = spec(ffn={"kind": "mlp", "expansion": {"start": 1, "end": 4}}, repeats=4).layers()
    assert [layer.ffn.hidden_size(32) for layer in ramp] == [32, 64, 96, 128]
    with pytest.raises(ConfigError, match="'window' lists 3 values, but 2 layers use it"):
        spec({"window": [4, 4, 4]})


NORM_PLACES = [{"norm_position": place} for place in ("pre", "post", "output", "sandwich")]
RESIDUALS = [{}, {"residual": "parallel"}, {"residual": "parallel", "shared_norm": True}]


@pytest.mark.quick_for("place0-residual0", "place1-residual1", "place2-residual2", "place3-residual0")
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("place", NORM_PLACES)
def test_every_residual_form(place, residual, bold):
    block = {**place, **residual}
    if residual.get("shared_norm") and place["norm_position"] in ("post", "output"):
        with pytest.raises(ConfigError, match="shared_norm"):
            spec(block=block)
        return
    model = spec(block=block).build()
    _, gradients = loss_and_gradient(model, bold(model), tokens())
    # Every parameter takes part.
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradients))
    norms = sum("norm.scale" in name and name.startswith("stack") for name, _ in parameter_table(model.declarations))
    wanted = {"pre": 2, "post": 2, "output": 2, "sandwich": 4}[place["norm_position"]]
    wanted -= place["norm_position"] == "post" and residual != {}
    assert norms == wanted - bool(residual.get("shared_norm"))


def test_bfloat16_tracks_float32(bold):
    model = spec().build()
    params, ids = bold(model), tokens()
    wide = logits_of(model, params, ids)
    narrow = logits_of(model, params, ids, dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.float32
    assert np.sqrt(np.mean((narrow - wide) ** 2)) < 0.03 * np.sqrt(np.mean(wide**2))


def test_parameters_declare_themselves():
    model = spec(learned_positions=16, final_norm={"kind": "layernorm"}).build()
    declarations = model.declarations
    table = dict(parameter_table(declarations))
    query = table["stack.segment_0.layer_0.mixer.inner.query.weight"]
    assert query.axes == ("layers", "embed", "heads", "head_dim") and query.matrix == ((1,), (2, 3)) and query.decay
    gate_up = table["stack.segment_0.layer_0.ffn.inner.gate_up.weight"]
    assert gate_up.axes == ("layers", "embed", "gate_up", "mlp") and gate_up.matrix == ((1,), (3,))
    assert str(gate_up.initializer) == "normal(0.1768)"
    undecayed = {name for name, declared in table.items() if not declared.decay}
    assert {"embedding.tokens", "embedding.positions", "head.norm.scale", "head.norm.bias"} <= undecayed
    assert jax.tree.structure(decay_mask(declarations)) == jax.tree.structure(
        jax.eval_shape(model.init, jax.random.key(0))
    )
    assert count_parameters(declarations) == sum(np.prod(d.shape) for d in table.values())


def test_initialisation_follows_the_declarations():
    model = spec(
        width=64,
        repeats=6,
        blocks={"layer": {"mixer": {"kind": "attention"}, "ffn": {"kind": "swiglu", "hidden": 256}}},
    ).build()
    params = jax.jit(model.init)(jax.random.key(0))["stack"]["segment_0"]["layer_0"]
    assert float(params["ffn"]["inner"]["gate_up"]["weight"].std()) == pytest.approx(64**-0.5, rel=0.02)
    assert float(params["ffn"]["inner"]["down"]["weight"].std()) == pytest.approx(256**-0.5 / 12**0.5, rel=0.02)


def test_flops_of_a_model_by_hand():
    model = spec({"kv_heads": None}, {"kind": "mlp", "hidden": 128}, repeats=3).build()
    per_layer = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 4 * 32 * (TIME + 1) / 2
    assert model.flops_per_token(TIME) == pytest.approx(3 * per_layer + 2 * 32 * VOCAB)
    windowed = spec({"kv_heads": None, "window": 1}, {"kind": "mlp", "hidden": 128}, repeats=3).build()
    assert model.flops_per_token(TIME) - windowed.flops_per_token(TIME) == pytest.approx(
        3 * 4 * 32 * ((TIME + 1) / 2 - 1)
    )


def test_a_window_bounds_the_cache():
    caches = spec({"window": 4, "kept_tokens": 2}).build().init_caches(1, 1000)
    assert caches["segment_0"]["layer_0"]["key"].shape == (2, 1, 6, 2, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixer": {"heads": 5, "kv_heads": None}}, "model.blocks.layer.mixer.heads: 5 heads do not divide width 32"),
        ({"mixer": {"kv_heads": 3}}, "model.blocks.layer.mixer.kv_heads: 3 do not divide 4 heads"),
        ({"mixer": {"kept_tokens": 3}}, "mixer.kept_tokens: tokens are kept beyond a window, and there is none"),
        ({"mixer": {"head_size": 7}}, "head_size: rotary positions turn pairs"),
        ({"layout": ["layr"]}, "model.layout[0]: no block is named 'layr'; did you mean 'layer'?"),
    ],
)
def test_faults_name_the_key(changes, words):
    with pytest.raises(ConfigError) as error:
        spec(**changes)
    assert words in str(error.value)


def test_a_table_of_positions_bounds_the_length():
    model = spec(learned_positions=16).build()
    with pytest.raises(ConfigError, match="train.sequence_length: 17 tokens, but model.learned_positions holds 16"):
        model.check_length(17, "train.sequence_length")


def test_left_padding_changes_nothing(bold):
    model = spec({"window": 5, "kept_tokens": 2}).build()
    params, ids = bold(model), tokens(1, 10)
    rows = Context.rows(1, 10)
    padded = Context(
        jnp.pad(rows.positions, ((0, 0), (6, 0))), jnp.pad(rows.segment_ids, ((0, 0), (6, 0))), "prefill"
    )  # fmt: skip
    caches = model.init_caches(1, 24)
    run = jax.jit(model.hidden)
    hidden, caches, _ = run(params, jnp.pad(ids, ((0, 0), (6, 0))), padded, caches)
    assert_close(model.logits_from(params, hidden[:, 6:]), logits_of(model, params, ids))
    following = replace(rows, positions=jnp.array([[10]]), segment_ids=jnp.array([[1]]), mode="decode", packed=True)
    hidden, _, _ = run(params, jnp.array([[3]]), following, caches)
    want = logits_of(model, params, jnp.concatenate([ids, jnp.array([[3]])], 1))[:, -1:]
    assert_close(model.logits_from(params, hidden), want)
