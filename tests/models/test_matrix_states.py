"""Mixers with a matrix of state per head against their equations, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, logit

from efficient_lm.errors import ConfigError
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.mixers.gla import GLASpec
from efficient_lm.models.mixers.hgrn2 import HGRN2Spec
from efficient_lm.models.mixers.lightning import LightningSpec
from efficient_lm.models.mixers.retention import RetentionSpec


def silu(x):
    return x * expit(x)


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def rms(y, axes=-1, epsilon=1e-5):
    return y / np.sqrt(np.mean(y**2, axis=axes, keepdims=True) + epsilon)


def turned(x, start=0):
    """`x [time, heads, size]` as rotary positions turn it: channel i and i + size / 2 are a pair."""
    half = x.shape[-1] // 2
    angle = (start + np.arange(len(x)))[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag], -1)


def read(q, k, v, log_decay):
    """``S_t = D_t S_{t-1} + k_t v_tᵀ``, ``y_t = S_tᵀ q_t``; `log_decay` broadcasts to ``[time, heads, key_size]``."""
    decay = np.exp(np.broadcast_to(log_decay, k.shape))
    state, rows = np.zeros((*k.shape[1:], v.shape[-1])), []
    for t in range(len(q)):
        state = decay[t][..., None] * state + k[t][..., None] * v[t][:, None, :]
        rows.append(np.einsum("hkv,hk->hv", state, q[t]))
    return np.stack(rows)


@pytest.mark.parametrize("options", [{}, {"heads": 2, "key_size": 6, "value_size": 5, "rank": 3, "temperature": 2.0}])
def test_gla_equals_its_equations(build_mixer, options):
    mixer = build_mixer(GLASpec(**options))
    q, k = np.moveaxis(mixer.linear("query_key", mixer.x), 1, 0)
    logits = mixer.linear("decay.up", mixer.linear("decay.down", mixer.x))
    log_decay = log_sigmoid(logits) / options.get("temperature", 16)
    y = rms(read(q / np.sqrt(q.shape[-1]), k, mixer.linear("value", mixer.x), log_decay))
    mixer.assert_equal(mixer.output(y * mixer.params["norm"]["scale"] * silu(mixer.linear("gate", mixer.x))))
    mixer.assert_equal(log_decay, mixer.log_decay)


@pytest.mark.parametrize("options", [{"heads": 2}, {"heads": 3, "key_size": 4, "position": {"kind": "none"}}])
def test_retention_equals_its_equations(build_mixer, options):
    mixer = build_mixer(RetentionSpec.model_validate(options))
    q, k = np.moveaxis(mixer.linear("query_key", mixer.x), 1, 0)
    if "position" not in options:
        q, k = turned(q), turned(k)
    log_decay = np.log(1 - 2.0 ** (-5 - np.arange(mixer.spec.heads)))
    y = read(q / np.sqrt(q.shape[-1]), k, mixer.linear("value", mixer.x), log_decay[:, None])
    y = y - y.mean(-1, keepdims=True)
    mixer.assert_equal(mixer.output(rms(y) * silu(mixer.linear("gate", mixer.x))))
    mixer.assert_equal(np.broadcast_to(log_decay, mixer.log_decay.shape), mixer.log_decay)


@pytest.mark.parametrize("layer", [0, 2])
def test_lightning_equals_the_equations_of_transnormer(build_mixer, layer):
    mixer = build_mixer(LightningSpec(heads=4), layer, 4)
    q, k = np.moveaxis(silu(mixer.linear("query_key", mixer.x)), 1, 0)
    if layer == 0:
        q, k = turned(q), turned(k)
    log_decay = -8 * np.arange(4) / 4 * (1 - layer / 4)
    y = rms(read(q, k, mixer.linear("value", mixer.x), log_decay[:, None]), (-2, -1), 1e-6)
    mixer.assert_equal(mixer.output(y * mixer.linear("gate", mixer.x)))
    mixer.assert_equal(np.broadcast_to(log_decay, mixer.log_decay.shape), mixer.log_decay)


def test_lightning_equals_the_equations_of_minimax(build_mixer):
    options = {"position": {"kind": "none"}, "norm": {"kind": "rmsnorm"}, "gate_activation": "sigmoid"}
    spec = LightningSpec.model_validate(
        {"heads": 2, "value_activation": "silu", "decay": "geometric", "key_size": 6, "value_size": 6, **options}
    )
    mixer = build_mixer(spec, 1, 3)
    q, k = np.moveaxis(silu(mixer.linear("query_key", mixer.x)), 1, 0)
    log_decay = -(2.0 ** np.array([-4, -8])) * (1 - 1 / (2 + 1e-5) + 1e-5)
    y = rms(read(q, k, silu(mixer.linear("value", mixer.x)), log_decay[:, None]), (-2, -1), 1e-6)
    mixer.assert_equal(mixer.output(y * mixer.params["norm"]["scale"] * expit(mixer.linear("gate", mixer.x))))


@pytest.mark.parametrize("layer", [0, 3])
def test_hgrn2_equals_its_equations(build_mixer, layer):
    mixer = build_mixer(HGRN2Spec(heads=2), layer, 4)
    q, gate = np.moveaxis(mixer.linear("query_key", mixer.x), 1, 0)
    bound = expit(logit(layer / 4) + mixer.params["bound"])
    forget = bound + (1 - bound) * expit(gate)
    y = rms(read(silu(q), 1 - forget, mixer.linear("value", mixer.x), np.log(forget)), (-2, -1))
    mixer.assert_equal(mixer.output(y * mixer.params["norm"]["scale"]))
    mixer.assert_equal(np.log(forget), mixer.log_decay)
    assert np.all(bound < 1)


@pytest.mark.parametrize("kind", ["lightning", "hgrn2"])
def test_layers_that_differ_by_depth_alone_share_one_program(kind, drawn):
    block = {"mixer": {"kind": kind, "heads": 2, "implementation": "reference"}}
    spec = {"width": 16, "vocab_size": 31, "blocks": {"a": block}, "layout": ["a"], "repeats": 3, "init_std": 0.5}
    scanned, unrolled = (ModelSpec.model_validate({**spec, "scan": scan}).build() for scan in (True, False))
    params, ids = drawn(scanned), jnp.arange(20)[None] % 31
    assert len(scanned.stack.segments) == 1
    want = jax.jit(unrolled.logits)(params, ids)
    np.testing.assert_allclose(jax.jit(scanned.logits)(params, ids), want, atol=2e-5 * float(jnp.abs(want).max()))
    swapped = jax.tree.map(lambda leaf: leaf[::-1], params["stack"])
    assert np.abs(jax.jit(scanned.logits)({**params, "stack": swapped}, ids) - want).max() > 1e-2


def test_sizes_of_the_papers():
    sizes = {spec.kind: spec.state_shape(1024) for spec in (GLASpec(), RetentionSpec(), LightningSpec(), HGRN2Spec())}
    assert sizes == {
        "gla": (4, 128, 256), "retention": (4, 256, 512), "lightning": (8, 128, 128), "hgrn2": (8, 128, 128)
    }  # fmt: skip


def test_costs_by_hand(cache_shapes):
    # Queries and keys of 8, values and gate and output of 16, the decay through 16; five operations per state entry.
    maps = 16 * (2 * 8 + 3 * 16) + 16 * (16 + 8)
    assert GLASpec().flops_per_token(16, 99) == 2 * maps + 5 * 4 * 2 * 4
    assert HGRN2Spec(heads=2).flops_per_token(16, 99) == 2 * 4 * 16 * 16 + 5 * 2 * 8 * 8
    made = cache_shapes(RetentionSpec(heads=2), 9999)
    assert made["state"].shape == (2, 2, 8, 16)
    assert made["state"].dtype == "float32"


@pytest.mark.parametrize(
    ("mixer", "words"),
    [
        ({"kind": "gla", "heads": 20}, "mixer.heads: 20 heads leave no values in width 32; at most 16"),
        ({"kind": "retention", "position": {"kind": "alibi"}}, "mixer.position: 'alibi' adds to the logits"),
        ({"kind": "lightning", "key_size": 5}, "mixer.key_size: rotary positions turn pairs of values, and 5 is odd"),
    ],
)
def test_faults_name_the_key(mixer, words):
    with pytest.raises(ConfigError) as error:
        ModelSpec.model_validate({"width": 32, "vocab_size": 9, "blocks": {"a": {"mixer": mixer}}, "layout": ["a"]})
    assert words in str(error.value)
