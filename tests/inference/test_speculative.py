"""Drafted and verified decoding against decoding token by token, and against exact probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.elastic.choices import choose
from efficient_lm.elastic.submodels import submodel_parameters, submodel_spec
from efficient_lm.errors import ConfigError
from efficient_lm.inference.decoding import Decoder
from efficient_lm.inference.sampling import SamplingSpec, filter_logits
from efficient_lm.inference.speculated import Speculated
from efficient_lm.inference.speculative import SpeculativeDecoder, takes_back
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.mixers.base import MixerSpec

GREEDY = SamplingSpec(temperature=0.0)
PROMPTS = [np.array([5], np.int32), np.array([1, 2, 3, 4, 5, 6, 7], np.int32), np.array([9, 8, 7], np.int32)]
SIZES = {"native_sparse": {"block_size": 4, "selected_blocks": 2, "window": 4}}


@pytest.fixture(scope="module")
def built(drawn):
    """``built(mixer, vocab=23, **parts)`` → a model whose blocks have these parts, and its parameters."""

    def make(mixer, vocab=23, **parts):
        model = _model(mixer, vocab, parts)
        return model, drawn(model)

    return make


def _model(mixer, vocab, parts):
    mixer = {"kind": mixer} if isinstance(mixer, str) else dict(mixer)
    mixer |= SIZES.get(mixer["kind"], {})
    block = {"mixer": mixer, "ffn": {"kind": "mlp", "hidden": 32}, **{name: dict(part) for name, part in parts.items()}}
    spec = {
        "width": 16,
        "vocab_size": vocab,
        "blocks": {"layer": block},
        "layout": ["layer"],
        "repeats": 2,
        "init_std": 0.4,
    }
    return ModelSpec.model_validate(spec).build()


def part(model, params, **parts):
    choice = choose(model, parts)
    small = submodel_spec(model, choice).build()
    return small, submodel_parameters(model, small, params, choice.layers)


def speculative(model, params, *parts, **options):
    return SpeculativeDecoder(model, params, [part(model, params, **axes) for axes in parts], **options)


def made(decoder, prompts, count, sampling=GREEDY, **options):
    return np.stack(list(decoder.stream(prompts, count, sampling, **options)), 1)


ATTENTION = (("kind", "attention"), ("heads", 2))
WINDOW = (*ATTENTION, ("window", 4), ("kept_tokens", 1))
SMALL = (*ATTENTION, ("head_size", 4))
KINDS = sorted({kind for kind, spec in MixerSpec.kinds.items() if not spec.bidirectional} - {"attention"})
MIXERS = [pytest.param(ATTENTION, id="attention"), pytest.param(WINDOW, id="window"), *KINDS]


@pytest.mark.quick_for("attention", "mamba")
@pytest.mark.parametrize("mixer", MIXERS)
def test_greedy_tokens_are_those_of_the_whole_model(mixer, built):
    model, params = built(mixer)
    decoder = speculative(model, params, {"ffn": 0.5}, tokens=3)
    assert decoder.shared and takes_back(model) == (mixer in (ATTENTION, "multi_latent", "differential_attention"))
    np.testing.assert_array_equal(made(decoder, PROMPTS, 20), made(Decoder(model, params), PROMPTS, 20))
    found = decoder.report
    assert 0 < found.accepted < found.drafted and found.tokens == 60


@pytest.mark.quick_for("layers")
@pytest.mark.parametrize(
    ("mixer", "parts"),
    [
        (ATTENTION, {"heads": 0.5}),
        ("mamba", {"layers": [1]}),
        (WINDOW, {"width": 0.5, "ffn": 0.5}),
    ],
    ids=["heads", "layers", "width"],
)
def test_a_draft_with_other_mixers_keeps_its_own_cache(mixer, parts, built):
    model, params = built(mixer)
    decoder = speculative(model, params, parts, tokens=2)
    assert not decoder.shared
    np.testing.assert_array_equal(made(decoder, PROMPTS, 12), made(Decoder(model, params), PROMPTS, 12))


@pytest.mark.quick_for("experts")
@pytest.mark.parametrize(
    "block",
    [
        {"depth": (("kind", "mixture_of_depths"), ("capacity", 0.5))},
        {"ffn": (("kind", "moe"), ("experts", 4), ("top_k", 1), ("expert", {"kind": "mlp", "hidden": 16}))},
    ],
    ids=["depths", "experts"],
)
def test_blocks_that_choose_tokens_or_experts(block, built):
    model, params = built(ATTENTION, **block)
    parts = {"experts": 0.5} if "ffn" in block else {"ffn": 0.5}
    decoder = speculative(model, params, parts, tokens=3)
    assert decoder.shared
    np.testing.assert_array_equal(made(decoder, PROMPTS, 16), made(Decoder(model, params), PROMPTS, 16))


def test_a_draft_like_the_whole_is_always_accepted(built):
    model, params = built(ATTENTION)
    decoder = SpeculativeDecoder(model, params, [(model, params)], tokens=3)
    made(decoder, PROMPTS, 9, SamplingSpec(temperature=1.0))
    found = decoder.report
    # One token with the prompt, then two times four.
    assert (found.verifications, found.drafted, found.accepted) == (6, 18, 18)
    assert found.figures()["tokens_per_verification"] == 4 and "100.0 % of drafted" in str(found)


@pytest.mark.slow
def test_rows_end_by_themselves(built):
    model, params = built(ATTENTION)
    plain, decoder = Decoder(model, params), speculative(model, params, {"ffn": 0.5}, tokens=3)
    end = int(made(plain, PROMPTS, 20)[1, 6])
    np.testing.assert_array_equal(made(decoder, PROMPTS, 20, end=end), made(plain, PROMPTS, 20, end=end))
    hot = SamplingSpec(temperature=1.5)
    first = made(decoder, PROMPTS, 20, hot, seed=1)
    np.testing.assert_array_equal(first, made(decoder, PROMPTS, 20, hot, seed=1))
    assert not np.array_equal(first, made(decoder, PROMPTS, 20, hot, seed=2))
    # How far other rows get is none of a row's business.
    np.testing.assert_array_equal(first[:1], made(decoder, PROMPTS[:1], 20, hot, seed=1))


VOCABULARY, LENGTH, ROWS = 3, 4, 2048
PROMPT = np.array([1, 0, 2], np.int32)


def exact(model, params, sampling):
    """Probabilities of all continuations of the prompt, ``[3**4]``, first token slowest."""
    ends = np.indices((VOCABULARY,) * LENGTH).reshape(LENGTH, -1).T
    rows = jnp.asarray(np.concatenate([np.tile(PROMPT, (len(ends), 1)), ends], axis=1))
    logits = jax.jit(model.logits)(params, rows)[:, len(PROMPT) - 1 : -1]
    chances = jax.nn.softmax(filter_logits(logits, sampling), axis=-1)
    return np.prod(np.take_along_axis(np.asarray(chances, np.float64), ends[..., None], axis=-1), axis=(1, 2))


def excess(counts, chances):
    """Pearson's statistic over cells of at least 5, others as one, in standard deviations above its mean."""
    wanted = chances * counts.sum()
    wide = wanted >= 5
    seen = np.append(counts[wide], counts[~wide].sum())
    wanted = np.append(wanted[wide], wanted[~wide].sum())
    seen, wanted = (seen, wanted) if wanted[-1] >= 5 else (seen[:-1], wanted[:-1])
    freedom = len(wanted) - 1
    return (np.sum((seen - wanted) ** 2 / wanted) - freedom) / np.sqrt(2 * freedom)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixer", "parts", "sampling"),
    [
        (SMALL, [{"ffn": 0.25}], {"temperature": 1.0}),
        (SMALL, [{"ffn": 0.125}, {"ffn": 0.5}], {"temperature": 0.8, "top_k": 2}),
        ((*SMALL, ("window", 3)), [{"layers": [1]}], {"temperature": 1.2, "min_p": 0.1}),
    ],
    ids=["shared", "sizes", "own"],
)
def test_samples_have_the_distribution_of_the_whole_model(mixer, parts, sampling, built):
    model, params = built(mixer, VOCABULARY)
    sampling = SamplingSpec(**sampling)
    decoder = speculative(model, params, *parts, tokens=2, confidence=0.6)
    rows = made(decoder, [PROMPT] * ROWS, LENGTH, sampling, seed=3)
    counts = np.bincount(rows @ VOCABULARY ** np.arange(LENGTH)[::-1], minlength=VOCABULARY**LENGTH)
    assert 0.05 < decoder.report.figures()["acceptance_rate"] < 0.97
    assert excess(counts, exact(model, params, sampling)) < 4
    # As many samples tell the drafts' distribution apart.
    assert excess(counts, exact(*decoder_draft(decoder), sampling)) > 10


def decoder_draft(decoder):
    return decoder.small[0], decoder.small_params[0]


@pytest.mark.slow
def test_a_draft_that_is_not_confident_leaves_the_token_to_a_larger_one(built):
    model, params = built(ATTENTION)
    plain = made(Decoder(model, params), PROMPTS, 20)
    shares = []
    for confidence in (0.0, 0.5, 1.0):
        decoder = speculative(model, params, {"ffn": 0.25}, {"ffn": 0.75}, tokens=3, confidence=confidence)
        np.testing.assert_array_equal(made(decoder, PROMPTS, 20), plain)
        shares.append(decoder.report.figures()["size_shares"][0])
        assert sum(decoder.report.sizes) == decoder.report.drafted
    assert shares[0] == 1 and 0 < shares[1] < 1 and shares[2] == 0


def test_what_cannot_be_verified_is_refused(built):
    dispatch = {"capacity_factor": 1.0}
    moe = {"ffn": (("kind", "moe"), ("experts", 4), ("expert", {"kind": "mlp", "hidden": 16}), ("dispatch", dispatch))}
    model, params = built(ATTENTION, **moe)
    with pytest.raises(ConfigError, match="draft: tokens compete for the experts of model.blocks.layer.ffn"):
        speculative(model, params, {"experts": 0.5})
    model, params = built(ATTENTION)
    with pytest.raises(ConfigError, match="draft: several sizes read one cache"):
        speculative(model, params, {"heads": 0.5}, {"ffn": 0.5})


def test_a_report_without_drafts():
    assert Speculated().figures()["acceptance_rate"] == 0 and Speculated().figures()["tokens_per_verification"] == 1
