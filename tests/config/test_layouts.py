"""The architectures that come as layouts: their sizes, their shares of each kind of layer, and that they train."""

from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.composition import compose
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.parameters import count_parameters
from efficient_lm.objectives.causal_lm import CausalLMSpec
from efficient_lm.validation import validate

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
TINY = [name for name in MODELS if name.endswith("_tiny")]
PUBLISHED = {
    "gated_delta_net_350m": 347e6, "griffin": 2.68e9, "hybrid_moe": 1.13e9, "jamba_3b": 3.03e9, "mamba2_130m": 129e6,
    "mamba2_hybrid": 8.65e9, "mamba_130m": 129e6, "masformer": 1.31e9, "mod_transformer_350m": 351e6,
    "olmoe_1b_7b": 6.92e9, "samba": 421e6,
}  # fmt: skip


def spec_of(name, **changes):
    values = compose("train", [f"model={name}"]).values["model"]
    return validate(ModelSpec, {**values, "vocab_size": values["vocab_size"] or 64, **changes}, "model")


def test_each_layout_has_a_published_and_a_small_size():
    assert {*TINY, *PUBLISHED, "uniform"} == set(MODELS)
    assert len(TINY) == len(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    count = count_parameters(spec_of(name).build().declarations)
    assert abs(count - PUBLISHED[name]) < 0.005 * PUBLISHED[name]
    title = (CONFIGS / "model" / f"{name}.yaml").read_text()
    assert "arXiv" in title or "AI21" in title


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("mamba2_hybrid", {"mamba2": 0.43, "attend": 0.07, "mlp": 0.50}),
        ("mamba2_hybrid_tiny", {"mamba2": 0.43, "attend": 0.07, "mlp": 0.50}),
        ("jamba_tiny", {"mamba": 7 / 8, "attend": 1 / 8}),
        ("samba", {"mamba": 0.5, "window": 0.5}),
        ("griffin", {"recur": 18 / 26, "attend": 8 / 26}),
        ("hybrid_moe", {"mamba2": 1 / 2, "mamba2_moe": 3 / 8, "attend_moe": 1 / 8}),
        ("hybrid_moe_tiny", {"mamba2": 1 / 2, "mamba2_moe": 3 / 8, "attend_moe": 1 / 8}),
    ],
)
def test_shares_of_layers(name, shares):
    names = spec_of(name).layer_names()
    found = {kind: count / len(names) for kind, count in Counter(names).items()}
    assert found.keys() == shares.keys()
    for kind, share in shares.items():
        assert abs(found[kind] - share) < 0.005


def test_few_layers_of_masformer_see_everything():
    for name in ("masformer", "masformer_tiny"):
        windows = [layer.mixer.window for layer in spec_of(name).layers()]
        whole = windows.count(None)
        assert 0 < whole <= len(windows) / 4 and set(windows[whole:]) != {None}


# Others have tests of what they are made of.
@pytest.mark.quick_for("moe_tiny")
@pytest.mark.parametrize("name", TINY)
def test_small_ones_learn(name, drawn):
    """A few steps on one short row bring its loss down, and every parameter has a gradient."""
    model = spec_of(name, width=48, remat="none").build()
    params = jax.tree.map(np.asarray, drawn(model))
    ids = jax.random.randint(jax.random.key(1), (1, 33), 0, 64)

    whole = Context.rows(1, 32)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": jnp.ones((1, 32))}
    batch |= {"positions": whole.positions, "segment_ids": whole.segment_ids}

    def loss(params):
        return CausalLMSpec().sums(model, params, batch, jnp.float32).loss / 32

    step = jax.jit(jax.value_and_grad(loss))
    before, gradients = jax.tree.map(np.asarray, step(params))
    # A predictor begins with zeros behind its first map.
    learning = [leaf for path, leaf in jax.tree.leaves_with_path(gradients) if "predictor" not in str(path)]
    assert all(np.abs(leaf).max() > 0 for leaf in learning)
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradients)))
    after, _ = step(jax.tree.map(lambda p, g: p - 0.1 * g / norm, params, gradients))
    assert np.isfinite(after) and after < before
