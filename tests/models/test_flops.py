"""FLOPs that specs count, against XLA's own count of the forward and backward pass, for every mixer and channel mixer.

The program is the one that defines an operator (``implementation: reference``), with every loop written out, for XLA
counts a loop's body once. It is counted as it is lowered: once XLA has fused it, what it computes again in several
fusions counts several times, in a recurrence that is written out up to four times. It computes the half of attention
that causal masks hide, which specs leave out: for the comparison they are told that all is seen.
"""

import importlib

import jax
import jax.numpy as jnp
import pytest

import efficient_lm.models.block  # noqa: F401  (registers every kind)
from efficient_lm.models.ffns.base import FFNSpec
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.mixers.base import MixerSpec
from efficient_lm.validation import validate

WIDTH, TIME, VOCABULARY = 256, 32, 64


def kinds(role):
    return sorted(kind for kind, found in role.kinds.items() if found.__module__.startswith("efficient_lm."))


def mixer(kind):
    """With default sizes, but for blocks small enough that a short row has several."""
    sizes = {"native_sparse": {"block_size": 4, "selected_blocks": 2, "window": TIME}}.get(kind, {})
    branches = {"first": "mamba2", "second": "attention"}
    parts = {
        "parallel": {name: {"mixer": mixer(inner)} for name, inner in branches.items()} if kind == "parallel" else {},
        "mamba_mixer": {name: {"implementation": "reference"} for name in ("token", "channel")},
    }.get(kind, {})  # fmt: skip
    form = {"implementation": "reference"} if "implementation" in MixerSpec.kinds[kind].model_fields else {}
    return {"kind": kind, **form, **sizes, **parts}


def ffn(kind):
    """Experts with equally many rows: of as many as choose them, the loop's length depends on the data."""
    return {"kind": kind, **({"dispatch": {"capacity_factor": 1.0}} if kind == "moe" else {})}


@pytest.fixture
def unrolled(monkeypatch):
    """Loops of known length are written out, and every token sees the whole row."""
    loops = importlib.import_module("jax._src.lax.control_flow.loops")
    scan = jax.lax.scan

    def written_out(f, init, xs=None, length=None, reverse=False, unroll=1, **options):
        return scan(f, init, xs, length, reverse, True, **options)

    for place in (jax.lax, loops):
        monkeypatch.setattr(place, "scan", written_out)
    for name in ("attention", "multi_latent", "native_sparse"):
        module = importlib.import_module(f"efficient_lm.models.mixers.{name}")
        monkeypatch.setattr(module, "mean_seen", lambda length, window, kept: min(length, window or length))


def counted_and_lowered(mixer_kind, ffn_kind):
    """FLOPs of a row by the specs, and its forward and backward pass."""
    block = {"mixer": mixer(mixer_kind), "ffn": ffn(ffn_kind)}
    values = {
        "width": WIDTH, "vocab_size": VOCABULARY, "blocks": {"layer": block}, "layout": ["layer"], "scan": False,
        "remat": "none",
    }  # fmt: skip
    model = validate(ModelSpec, values, "model").build()

    def loss(params, tokens):
        return jnp.sum(model.logits(params, tokens) ** 2)

    params, tokens = jax.eval_shape(model.init, jax.random.key(0)), jax.ShapeDtypeStruct((1, TIME), jnp.int32)
    return TIME * model.training_flops_per_token(TIME), jax.jit(jax.grad(loss)).lower(params, tokens)


QUICK = [f"{mixer}-{ffn}" for mixer, ffn in (("attention", "swiglu"), ("gla", "moe"), ("gated_delta_net", "mlp"))]


@pytest.mark.quick_for(*QUICK)
@pytest.mark.parametrize("ffn_kind", kinds(FFNSpec))
@pytest.mark.parametrize("mixer_kind", kinds(MixerSpec))
def test_flops_are_those_of_the_program(unrolled, mixer_kind, ffn_kind):
    counted, lowered = counted_and_lowered(mixer_kind, ffn_kind)
    assert counted == pytest.approx(lowered.cost_analysis()["flops"], rel=0.05)


@pytest.mark.quick_for("attention")
@pytest.mark.parametrize("mixer_kind", ["attention", "differential_attention", "multi_latent", "short_conv"])
def test_flops_are_those_of_the_compiled_program_where_nothing_is_a_loop(unrolled, mixer_kind):
    counted, lowered = counted_and_lowered(mixer_kind, "swiglu")
    assert counted == pytest.approx(lowered.compile().cost_analysis()["flops"], rel=0.05)
