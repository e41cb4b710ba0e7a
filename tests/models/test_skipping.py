"""Policies of inference: what they run, that decoding agrees with a full pass, that what is skipped is not computed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import efficient_lm.models.skipping  # noqa: F401  (every kind of the folder registers itself)
from efficient_lm.errors import ConfigError
from efficient_lm.inference.decoding import Decoder
from efficient_lm.inference.sampling import SamplingSpec
from efficient_lm.models import block as blocks
from efficient_lm.models.computed import computed
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.skipping.base import SkippingSpec, cosine
from efficient_lm.models.skipping.confidence import MEASURES

VOCAB, WIDTH, TIME = 23, 16, 12
ATTEND = {"mixer": {"kind": "attention", "heads": 2}, "ffn": {"kind": "mlp"}}
RECUR = {"mixer": {"kind": "rg_lru"}}
EXITS = {"every": 1, "norm": "own", "stream": {"rank": 4}, "loss": {"kind": "ponder"}}
ROWS = Context.rows(2, TIME)
IDS = jax.random.randint(jax.random.key(3), (2, TIME), 0, VOCAB)


def spec(blocks=None, layout=("attend", "recur"), repeats=2, **options):
    blocks = blocks or {"attend": ATTEND, "recur": RECUR}
    base = {"width": WIDTH, "vocab_size": VOCAB, "blocks": blocks, "layout": list(layout), "repeats": repeats}
    return ModelSpec.model_validate({**base, **options})


def policy(kind, **options):
    return SkippingSpec.lookup(kind).model_validate(options)


@pytest.fixture(scope="module")
def model():
    return spec(exits=EXITS).build()


@pytest.fixture(scope="module")
def params(model, bold):
    return bold(model)


def passes(model, skipping):
    """A jitted pass: normed streams, caches, and which halves ran."""

    @jax.jit
    def run(params, ids, context, caches):
        hidden, caches, auxiliary = model.hidden(params, ids, context, caches, skipping=skipping)
        return hidden, caches, model.stack.ran(auxiliary.observed, context.segment_ids != 0)

    return run


@pytest.fixture(scope="module")
def plain(model, params):
    return passes(model, None)(params, IDS, ROWS, None)[0]


POLICIES = {
    "uniform": {"layers": 2},
    "skip_decode": {"least": 2, "over": 8, "warmup_tokens": 2},
    "ffn_skip": {"threshold": 0.7, "first": 0, "warmup_tokens": 1},
    "confidence": {"threshold": 0.35},
    "patience": {"exits_alike": 1},
    "saturation": {"threshold": 0.8},
    "ponder": {"q": 0.6},
}


@pytest.mark.quick_for("confidence")
@pytest.mark.parametrize("kind", POLICIES)
def test_prefill_and_decoding_equal_the_full_pass(model, params, plain, kind):
    run, empty = passes(model, policy(kind, **POLICIES[kind])), model.init_caches(2, TIME)
    whole = replace(ROWS, mode="prefill", packed=True)
    want, _, wanted = run(params, IDS, whole, empty)
    # The first 7 tokens behind padding, so that one program reads all and some.
    first = jax.tree.map(lambda leaf: jnp.pad(leaf[:, :7], ((0, 0), (TIME - 7, 0))), (ROWS.positions, ROWS.segment_ids))
    y, caches, halves = run(params, jnp.pad(IDS[:, :7], ((0, 0), (TIME - 7, 0))), Context(*first, "prefill"), empty)
    hidden, ran = [y[:, TIME - 7 :]], [halves[..., TIME - 7 :]]
    for index in range(7, TIME):
        context = Context(ROWS.positions[:, index, None], ROWS.segment_ids[:, index, None], "decode")
        y, caches, halves = run(params, IDS[:, index, None], context, caches)
        hidden.append(y)
        ran.append(halves)
    np.testing.assert_allclose(jnp.concatenate(hidden, 1), want, atol=1e-5 * float(jnp.abs(want).max()))
    assert np.array_equal(np.concatenate(ran, -1), wanted)
    # Some of the tokens skip something, and that changes what the head reads.
    share = np.asarray(wanted).mean((2, 3))
    assert share.min() < 1 and share.max() == 1 and float(jnp.abs(want - plain).max()) > 0.1


NEUTRAL = {"skip_decode": {"least": 4}, "ffn_skip": {"threshold": 1.0}, "confidence": {"threshold": 1.0}}


@pytest.mark.parametrize("kind", NEUTRAL)
def test_a_policy_that_skips_nothing_is_the_plain_model(model, params, plain, kind):
    skipping = policy(kind, **NEUTRAL[kind])
    hidden, _, ran = passes(model, skipping)(params, IDS, ROWS, None)
    # Two programs, whose sums XLA may fuse in other ways.
    np.testing.assert_allclose(hidden, plain, atol=2e-6 * float(jnp.abs(plain).max()))
    found = computed(model, skipping, np.asarray(ran).sum((2, 3)), 2 * TIME, TIME).figures()
    assert np.all(ran) and found["mixer_shares"] == [1, 1, 1, 1] and found["ffn_shares"] == [1, 0, 1, 0]


RESIDUALS = [{"residual": "parallel", "norm_position": "post"}, {"norm_position": "stream"}]


@pytest.mark.parametrize("options", RESIDUALS)
def test_skipped_layers_are_as_if_removed(options, bold):
    block = ATTEND | options
    deep, shallow = (spec({"layer": block}, ["layer"], repeats).build() for repeats in (5, 3))
    params = bold(deep)
    kept = policy("uniform", layers=3).kept(5)
    stack = jax.tree.map(lambda leaf: leaf[np.array(kept)], params["stack"])
    got = passes(deep, policy("uniform", layers=3))(params, IDS, ROWS, None)[0]
    want = passes(shallow, None)(params | {"stack": stack}, IDS, ROWS, None)[0]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_which_layers_are_kept():
    assert policy("uniform", layers=4).kept(10) == [0, 3, 6, 9]
    assert policy("uniform", layers=1).kept(10) == [0]
    assert policy("uniform", layers=5, placement="contiguous").kept(10) == [0, 1, 2, 8, 9]
    assert [policy("uniform", layers=count, placement="contiguous").kept(4) for count in (4, 2)] == [
        [0, 1, 2, 3],
        [0, 3],
    ]


def test_layers_fall_with_the_position(model, params):
    skipping = policy("skip_decode", most=4, least=2, over=8, warmup_tokens=2)
    budget = np.asarray(skipping.budget(jnp.arange(TIME), 4))
    assert budget.tolist() == [4, 4, 4, 4, 4, 3, 3, 3, 2, 2, 2, 2] and np.all(np.diff(budget) <= 0)
    ran = np.asarray(passes(model, skipping)(params, IDS, ROWS, None)[2])
    assert np.array_equal(ran[0, :, 0].sum(0), budget)
    assert ran[0, :, 0, 5].tolist() == [True, False, True, True]


def test_ffns_are_skipped_behind_one_that_changes_little(bold):
    model = spec({"layer": ATTEND}, ["layer"], 6).build()
    params = bold(model)
    skipping = policy("ffn_skip", threshold=0.9, skip=2, first=1, last=1, warmup_tokens=3)
    hidden, _, ran = passes(model, skipping)(params, IDS, ROWS, None)
    x, left = model.entered(params, IDS, ROWS)[0], np.zeros((2, TIME), int)

    @jax.jit
    def halves(x, layer):
        values = jax.tree.map(lambda leaf: leaf[layer], params["stack"]["segment_0"]["layer_0"])
        block = model.stack.periods[0][0](values)
        between = x + block.mixer(x, ROWS, None)[0]
        return between, between + block.ffn(between, ROWS)[0]

    for layer in range(6):
        between, after = halves(x, layer)
        cold = layer in (0, 5)
        skips = (left > 0) & (np.asarray(ROWS.positions) >= 3) & (not cold)
        assert np.array_equal(ran[1, layer], ~skips) and np.all(ran[0, layer])
        alike = np.asarray(cosine(between, after)) > 0.9
        if not cold:
            left = np.where(skips, left - 1, np.where(alike, 2, 0))
        x = jnp.where(skips[..., None], between, after)
    assert 0.1 < 1 - np.mean(ran[1]) < 0.7
    np.testing.assert_allclose(hidden, model.normed(params, x), atol=1e-5)


def test_confidence_is_of_the_probabilities():
    logits = np.random.default_rng(0).normal(0, 2, VOCAB)
    p = np.exp(logits) / np.exp(logits).sum()
    first, second = np.sort(p)[::-1][:2]
    wanted = {"probability": first, "margin": first - second, "entropy": 1 + np.sum(p * np.log(p)) / np.log(VOCAB)}
    for name, value in wanted.items():
        assert float(MEASURES[name](jnp.asarray(logits, jnp.float32))) == pytest.approx(value, abs=1e-6)


def test_a_token_leaves_at_the_first_exit_that_is_sure(model, params, plain):
    skipping = policy("confidence", threshold=0.35, layers=[1, 3])
    hidden, _, ran = passes(model, skipping)(params, IDS, ROWS, None)
    streams = jax.jit(model.hidden_with_exits)(params, IDS)[1].read
    first = model.exits.normed(params, 0, streams[0], None)
    sure = np.asarray(jax.nn.softmax(model.logits_from(params, first))).max(-1) > 0.35
    assert 0 < sure.mean() < 1
    assert np.all(ran[0, 0]) and np.array_equal(ran[0, 1], ~sure)
    np.testing.assert_allclose(hidden[sure], first[sure], atol=1e-5)
    # There is no exit behind the second layer, and who left does not come back.
    assert np.array_equal(ran[0, 1], ran[0, 2]) and not np.any(ran[0, 3] & ~ran[0, 2])


def test_exits_of_a_model_without_any_read_the_final_norm(bold):
    model = spec().build()
    params = bold(model)
    hidden, _, ran = passes(model, policy("confidence", threshold=0.0, layers=[2]))(params, IDS, ROWS, None)
    assert np.all(ran[:, :2]) and not np.any(ran[:, 2:])
    half = spec(repeats=1).build()
    first = jax.tree.map(lambda leaf: leaf[:1], params["stack"]["segment_0"])
    stack = {"segment_0": {"layer_0": first["layer_0"]}, "segment_1": {"layer_0": first["layer_1"]}}
    want = passes(half, None)(params | {"stack": stack}, IDS, ROWS, None)[0]
    np.testing.assert_allclose(hidden, want, atol=1e-5)


def test_a_prompt_may_be_read_whole(model, params, plain):
    run = passes(model, policy("uniform", layers=2, prompt=False))
    context = Context(ROWS.positions, ROWS.segment_ids, "prefill")
    hidden, _, ran = run(params, IDS, context, model.init_caches(2, TIME))
    assert np.all(ran)
    np.testing.assert_allclose(hidden, plain, atol=1e-5 * float(jnp.abs(plain).max()))


def test_what_no_row_runs_is_not_computed(monkeypatch, bold):
    """Each half says when it is computed; in decoding, those that the policy skips do not."""
    computed_halves = []
    original = blocks.Half.__call__

    def counted(self, x, context, *rest):
        kind = "ffn" if hasattr(self.inner, "down") else "mixer"
        if context.mode == "decode":
            jax.debug.callback(lambda layer: computed_halves.append((kind, int(layer))), context.layer)
        return original(self, x, context, *rest)

    monkeypatch.setattr(blocks.Half, "__call__", counted)
    model = spec({"layer": ATTEND}, ["layer"], 5).build()
    params = bold(model)
    for skipping, mixers, ffns in (
        (policy("uniform", layers=2), [0, 4], [0, 4]),
        (policy("ffn_skip", threshold=-1.0), [0, 1, 2, 3, 4], [0, 1, 4]),
        # Behind an exit a mixer still makes the keys and values that later tokens may need.
        (policy("confidence", threshold=0.0, layers=[3]), [0, 1, 2, 3, 4], [0, 1, 2]),
    ):
        decoder = Decoder(model, params, skipping=skipping)
        list(decoder.stream([np.array([1, 2, 3], np.int32)], 2, SamplingSpec(temperature=0.0)))
        jax.effects_barrier()
        assert sorted(layer for kind, layer in computed_halves if kind == "mixer") == mixers
        assert sorted(layer for kind, layer in computed_halves if kind == "ffn") == ffns
        assert decoder.report.ffns.tolist() == [float(layer in ffns) for layer in range(5)]
        computed_halves.clear()


def test_a_decoder_decodes_by_the_policy_and_reports(model, params):
    skipping = policy("confidence", threshold=0.35)
    decoder, run = Decoder(model, params, skipping=skipping), passes(model, skipping)
    assert Decoder(model, params).report is None
    prompts = [np.array([5], np.int32), np.array([1, 2, 3, 4, 5, 6, 7], np.int32)]
    made = np.stack(list(decoder.stream(prompts, 5, SamplingSpec(temperature=0.0))), 1)
    halves = np.zeros((2, 4))
    for prompt, row in zip(prompts, made, strict=True):
        ids = np.concatenate([prompt, row])
        padded = np.zeros((2, TIME), np.int32)
        padded[0, : len(ids)] = ids
        hidden, _, ran = run(params, padded, ROWS, None)
        likeliest = np.asarray(jnp.argmax(model.logits_from(params, hidden), -1))[0]
        assert likeliest[len(prompt) - 1 : len(ids) - 1].tolist() == row.tolist()
        halves += np.asarray(ran)[:, :, 0, len(prompt) : len(ids) - 1].sum(-1)
    report = decoder.report
    assert report.tokens == 8 and report.mixers.tolist() == halves[0].tolist()
    assert report.ffns.tolist() == (halves[1] * [1, 0, 1, 0]).tolist() and "8 tokens ran" in str(report)


def test_rows_that_have_ended_are_not_counted(model, params):
    decoder = Decoder(model, params, skipping=policy("uniform", layers=2))
    prompts = [np.array([5], np.int32), np.array([9, 8], np.int32)]
    free = np.stack(list(decoder.stream(prompts, 6, SamplingSpec(temperature=0.0))), 1)
    assert decoder.report.tokens == 2 * 5
    end = int(free[0, 2])
    made = np.stack(list(decoder.stream(prompts, 6, SamplingSpec(temperature=0.0), end=end)), 1)
    stops = [int(np.argmax(row == end)) if end in row else 6 for row in made]
    assert decoder.report.tokens == sum(min(stop, 5) for stop in stops) < 10


def test_flops_are_those_of_the_spec(model):
    everything = np.full((2, 4), 10.0)
    found = computed(model, None, everything, 10, TIME)
    assert found.flops == pytest.approx(10 * model.flops_per_token(TIME)) and found.flops == found.full_flops
    half = everything * [1, 1, 0, 0]
    found = computed(model, policy("confidence", layers=[2, 3]), half, 10, TIME)
    head, stream = 2 * WIDTH * VOCAB, 2 * 3 * WIDTH * 4
    # Half of the layers, the accelerated stream past them, the head, and the head at the exit they were left at.
    assert found.flops / 10 == pytest.approx((model.flops_per_token(TIME) - head) / 2 + 2 * head + 2 * stream)
    pondered = computed(model, policy("ponder"), half, 10, TIME)
    assert (found.flops - pondered.flops) / 10 == pytest.approx(head - 2 * 2 * WIDTH)
    assert found.figures()["mixers_per_token"] == 2 and found.figures()["ffns_per_token"] == 1


FAULTS = [
    (policy("uniform", layers=5), {}, "skipping.layers: 5, but the model has 4 layers; nearest that works: 4"),
    (policy("skip_decode", least=5), {}, "skipping.least: 5, but there are 4 at most"),
    (policy("skip_decode", least=2, most=7), {}, "skipping.most: 7, but the model has 4 layers"),
    (policy("skip_decode", least=2, warmup_layers=3), {}, "skipping.warmup_layers: 3, but only 2 layers run last"),
    (policy("ffn_skip", first=3, last=2), {}, "skipping.last: 2, but 1 layers are left behind the first"),
    (policy("saturation", first=4), {}, "skipping.first: 4, but the model has 4 layers; nearest that works: 3"),
    (policy("confidence"), {}, "skipping.layers: 'confidence' needs exits, and the model has none"),
    (policy("confidence", layers=[4]), {}, "skipping.layers: there is no exit behind layer 4 of 4 but the head"),
    (policy("patience", layers=[1]), {"exits": {"layers": [2, 3]}}, "behind layer 1; did you mean 2? valid: 2, 3"),
    (policy("patience", layers=[]), {"exits": {"layers": [2, 3]}}, "skipping.layers: the list is empty; valid: 2, 3"),
    (policy("patience"), {"exits": {"layers": [2, 3]}}, "skipping.exits_alike: 2, but of 2 exits the first has none"),
    (policy("patience"), {"exits": {"every": 2}}, "skipping.layers: one exit has none before it to agree with"),
    (policy("ponder"), {"exits": {"every": 2}}, "skipping.kind: 'ponder' needs probabilities to leave"),
]  # fmt: skip


@pytest.mark.parametrize(("skipping", "options", "words"), FAULTS)
def test_faults_name_the_key(skipping, options, words):
    model = spec(**options).build()
    with pytest.raises(ConfigError) as error:
        skipping.check(model)
    assert words in str(error.value)
    with pytest.raises(ConfigError):
        Decoder(model, {}, skipping=skipping)


def test_a_policy_and_a_depth_rule_that_choose_do_not_stack():
    blocks = {"attend": ATTEND | {"depth": {"kind": "router_skip"}}, "recur": RECUR}
    with pytest.raises(ConfigError, match="'uniform' and the depth rule 'router_skip' of model.blocks.attend"):
        policy("uniform", layers=2).check(spec(blocks).build())
    blocks["attend"] = ATTEND | {"depth": {"kind": "layer_drop"}}
    policy("uniform", layers=2).check(spec(blocks).build())
