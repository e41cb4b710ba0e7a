"""What every sequence mixer is held to, whatever its kind: a new one is tested by being registered.

Each mixer has its default options, but for a small chunk so that a short row has several. Few programs are compiled:
all lengths of documents, prompts and pieces share them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import efficient_lm.models.block  # noqa: F401  (registers every kind)
from efficient_lm.models.context import Context
from efficient_lm.models.mixers.base import MixerSpec
from efficient_lm.models.parameters import Blueprint, Initialization

WIDTH, TIME, PREFILL = 32, 70, 24
KINDS = sorted(kind for kind, found in MixerSpec.kinds.items() if found.__module__.startswith("efficient_lm."))
CAUSAL = [kind for kind in KINDS if not MixerSpec.kinds[kind].bidirectional]
DOCUMENTS = (1, 20, 33, 1, 12)


class Mixer:
    """A kind with parameters large enough that every part of it matters, and its compiled programs."""

    def __init__(self, drawn, kind, **options):
        found = MixerSpec.kinds[kind]
        chunk = {"chunk_size": 16} if "chunk_size" in found.model_fields else {}
        self.spec = found(**chunk, **options)
        assert not list(self.spec.faults(WIDTH)), "the defaults must fit a small width"
        self.spec = self.spec.resolved(WIDTH)
        self.blueprint = Blueprint(lambda: self.spec.build(WIDTH, Initialization()))
        self.params = drawn(self.blueprint, 0.1)
        self.rows = jax.jit(lambda x, context: self.blueprint(self.params)(x, context)[0])
        self.slopes = jax.jit(jax.value_and_grad(self.total, argnums=(0, 1)))
        self.piece = jax.jit(lambda x, context, cache: self.blueprint(self.params)(x, context, cache))

    def total(self, params, x, weights):
        """Of the outputs for a packed row, times weights."""
        return jnp.sum(self.blueprint(params)(x, packed_context(DOCUMENTS))[0] * weights)

    def empty_cache(self, length=TIME, dtype=jnp.float32, batch=1):
        return self.blueprint(self.params).init_cache(batch, length, dtype)

    def decode(self, x, start, cache):
        """Tokens from `start` on, one at a time."""
        made = []
        for index in range(start, x.shape[1]):
            context = Context(jnp.full((1, 1), index, jnp.int32), jnp.ones((1, 1), jnp.int32), "decode")
            y, cache = self.piece(x[:, index : index + 1], context, cache)
            made.append(y)
        return jnp.concatenate(made, axis=1)


@pytest.fixture(scope="module")
def mixer_of(drawn):
    return functools.cache(functools.partial(Mixer, drawn))


def inputs(batch=1, key=3, scale=1.0):
    return scale * jax.random.normal(jax.random.key(key), (batch, TIME, WIDTH), jnp.float32)


def alone(length, total=TIME):
    """A context of one document at the row's beginning, and padding."""
    index = jnp.arange(total, dtype=jnp.int32)[None]
    return Context(index, (index < length).astype(jnp.int32))


def packed_context(lengths):
    segments = np.zeros((1, TIME), np.int32)
    positions = np.zeros((1, TIME), np.int32)
    start = 0
    for number, length in enumerate(lengths):
        segments[0, start : start + length] = number + 1
        positions[0, start : start + length] = np.arange(length)
        start += length
    return Context(jnp.asarray(positions), jnp.asarray(segments))


def check_close(got, want, tolerance=2e-5):
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    assert np.all(np.isfinite(got))
    assert np.abs(got - want).max() <= tolerance * max(np.abs(want).max(), 1e-3)


@pytest.fixture(params=KINDS)
def mixer(request, mixer_of):
    return mixer_of(request.param)


@pytest.fixture(params=CAUSAL)
def causal(request, mixer_of):
    return mixer_of(request.param)


@pytest.mark.quick_for("attention", "mamba", "mamba2", "gated_delta_net", "gla", "hydra")
def test_rows_without_documents_equal_rows_of_one_document(mixer):
    x = inputs()
    check_close(mixer.rows(x, Context.rows(1, TIME)), mixer.rows(x, alone(TIME)))


def test_documents_of_a_row_stay_apart(mixer):
    x, start = inputs(), 0
    packed = mixer.rows(x, packed_context(DOCUMENTS))
    for length in DOCUMENTS:
        own = jnp.zeros_like(x).at[:, :length].set(x[:, start : start + length])
        check_close(packed[:, start : start + length], mixer.rows(own, alone(length))[:, :length])
        start += length
    assert np.all(np.isfinite(packed)), "padding must not make numbers that are none"


def test_the_future_is_not_seen(causal):
    x = inputs()
    for cut in (1, 16, 33, TIME - 1):
        changed = x.at[:, cut:].add(1.0)
        before, after = causal.rows(x, alone(TIME)), causal.rows(changed, alone(TIME))
        check_close(after[:, :cut], before[:, :cut], 1e-6)
        assert np.abs(np.asarray(after - before)[:, cut]).max() > 1e-4, "and the present is"


@pytest.mark.quick_for("attention", "mamba", "mamba2", "gated_delta_net", "gla", "multi_latent")
def test_two_pieces_with_a_carried_cache_equal_the_whole(causal):
    x, rows = inputs(), alone(TIME)
    whole, cache, made = causal.rows(x, rows), causal.empty_cache(), []
    for index in (slice(0, PREFILL), slice(PREFILL, TIME)):
        mode = "prefill" if index.start == 0 else "decode"
        y, cache = causal.piece(x[:, index], Context(rows.positions[:, index], rows.segment_ids[:, index], mode), cache)
        made.append(y)
    check_close(jnp.concatenate(made, 1), whole)


@pytest.mark.parametrize("prompt", [1, 7, PREFILL])
def test_prefill_and_decoding_equal_the_whole(causal, prompt):
    """The prompt comes with padding on its left, as batches of prompts do."""
    x, total = inputs(), PREFILL + 4
    whole = causal.rows(x, alone(TIME))
    pad = PREFILL - prompt
    index = jnp.arange(PREFILL, dtype=jnp.int32)[None] - pad
    context = Context(jnp.maximum(index, 0), (index >= 0).astype(jnp.int32), "prefill")
    padded = jnp.concatenate([jnp.ones((1, pad, WIDTH)), x[:, :prompt]], axis=1)
    y, cache = causal.piece(padded, context, causal.empty_cache())
    check_close(y[:, pad:], whole[:, :prompt])
    check_close(causal.decode(x[:, :total], prompt, cache), whole[:, prompt:total])


@pytest.mark.quick_for("attention", "mamba", "mamba2", "gated_delta_net", "gla")
def test_bfloat16_follows_float32(mixer):
    x = inputs()
    exact = np.asarray(mixer.rows(x, alone(TIME)))
    rough = mixer.rows(x.astype(jnp.bfloat16), alone(TIME))
    assert rough.dtype == jnp.bfloat16
    error = np.asarray(rough, np.float32) - exact
    assert np.sqrt(np.mean(error**2)) < 3e-2 * np.sqrt(np.mean(exact**2))


@pytest.mark.quick_for("attention", "mamba", "mamba2", "gated_delta_net", "gla")
def test_gradients_are_finite_at_any_scale(mixer):
    for scale in (0.0, 1.0, 1e3):
        for leaf in jax.tree.leaves(mixer.slopes(mixer.params, inputs(scale=scale), inputs(key=9))):
            assert np.all(np.isfinite(leaf))


@pytest.mark.quick_for("mamba", "mamba2", "gated_delta_net", "gla", "kda", "rg_lru")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "implementation" in MixerSpec.kinds[kind].model_fields])
def test_the_chunked_form_equals_the_reference(kind, mixer_of, drawn):
    """The chunked form is what runs where nothing is said."""
    by_tokens, chunked = Mixer(drawn, kind, implementation="reference"), mixer_of(kind)
    x, weights = inputs(), inputs(key=9)
    (want, wanted), (got, gotten) = (mixer.slopes(mixer.params, x, weights) for mixer in (by_tokens, chunked))
    check_close(got, want)
    norms = [np.linalg.norm(leaf) for leaf in jax.tree.leaves(wanted)]
    for left, right, norm in zip(jax.tree.leaves(gotten), jax.tree.leaves(wanted), norms, strict=True):
        assert np.linalg.norm(np.asarray(left - right)) <= 1e-4 * max(norm, 1e-3 * max(norms))


def test_costs_are_counted(mixer):
    flops = [mixer.spec.flops_per_token(WIDTH, length) for length in (64, 4096)]
    weights = sum(d.size for d in jax.tree.leaves(mixer.blueprint.declarations, is_leaf=lambda d: hasattr(d, "axes")))
    assert 0.5 * weights < flops[0] <= flops[1], "each weight is read at least about once per token"


def test_a_bidirectional_mixer_refuses_a_cache(mixer_of):
    for kind in set(KINDS) - set(CAUSAL):
        mixer = mixer_of(kind)
        with pytest.raises(ValueError, match="bidirectional"):
            mixer.empty_cache()


def test_every_mixer_has_a_choice_of_its_name():
    from pathlib import Path

    import efficient_lm

    configs = Path(efficient_lm.__file__).parent.parent / "configs" / "mixer"
    assert {path.stem for path in configs.glob("*.yaml")} == set(KINDS)
