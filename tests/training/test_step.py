"""The training step: accumulation, clipping, the guard against what is not a number, devices."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.parameters import decay_mask
from efficient_lm.objectives.causal_lm import CausalLMSpec
from efficient_lm.training.parallelism import ParallelismSpec
from efficient_lm.training.step import initial_state, make_step

MIXER = {"kind": "attention", "heads": 2}
SPEC = ModelSpec.model_validate(
    {
        "width": 16,
        "vocab_size": 31,
        "blocks": {"layer": {"mixer": MIXER, "ffn": {"kind": "swiglu"}}},
        "layout": ["layer"],
        "repeats": 2,
    }
)


def rows(batch, time=12, key=0):
    """Packed rows with padding of different length in each, so that a mean of means would be wrong."""
    rng = np.random.default_rng(key)
    segments = np.ones((batch, time), np.int32)
    for row in range(batch):
        segments[row, 4 + row % 5 :] = 2
        segments[row, time - row % 7 :] = 0
    positions = np.where(segments == 1, np.arange(time), np.arange(time) - 4)
    return {
        "tokens": rng.integers(0, 31, (batch, time)).astype(np.int32),
        "targets": rng.integers(0, 31, (batch, time)).astype(np.int32),
        "segment_ids": segments,
        "positions": np.maximum(positions, 0).astype(np.int32),
        "weights": (segments != 0).astype(np.float32),
    }


def stepped(batch, steps=1, optimizer=None, **options):
    model = SPEC.build()
    optimizer = optimizer or optax.sgd(1.0)
    step = jax.jit(make_step(model, CausalLMSpec(z_loss=1e-3), optimizer, **options))
    state = initial_state(model.init(jax.random.key(0)), optimizer)
    for _ in range(steps):
        state, metrics = step(state, batch)
    return state, metrics


def gap(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return max(float(jnp.abs(a - b).max()) for a, b in pairs)


def test_accumulating_equals_the_whole_batch():
    batch = rows(32)
    whole, metrics = stepped(batch)
    pieces, accumulated = stepped(batch, accumulate=4)
    # Sums are added in another order: float32 rounding, 1e-5 of values of about one.
    assert gap(whole["parameters"], pieces["parameters"]) < 1e-5
    for name in metrics:
        np.testing.assert_allclose(metrics[name], accumulated[name], rtol=1e-5)
    assert float(metrics["weight"]) == batch["weights"].sum()


def test_padding_rows_change_nothing():
    batch = rows(8)
    padded = {name: np.concatenate([array, np.zeros_like(array)]) for name, array in batch.items()}
    # Sums of more rows are added in another order: float32 rounding, 1e-5 of values of about one.
    assert gap(stepped(batch)[0]["parameters"], stepped(padded)[0]["parameters"]) < 1e-5


def test_clipping_bounds_the_update():
    free, metrics = stepped(rows(8))
    clipped, _ = stepped(rows(8), clip_norm=0.05)
    start = initial_state(SPEC.build().init(jax.random.key(0)), optax.sgd(1.0))["parameters"]

    def moved(state):
        return float(optax.tree.norm(jax.tree.map(jnp.subtract, state["parameters"], start)))

    assert moved(free) == pytest.approx(float(metrics["grad_norm"]), rel=1e-4)
    assert moved(clipped) == pytest.approx(0.05, rel=1e-3)


def test_a_step_that_is_not_a_number_changes_only_counters():
    batch = rows(8)
    broken = {**batch, "weights": batch["weights"] * np.float32(np.nan)}
    optimizer = optax.adamw(1e-2, mask=decay_mask(SPEC.build().declarations))
    model = SPEC.build()
    step = jax.jit(make_step(model, CausalLMSpec(), optimizer))
    before, _ = step(initial_state(model.init(jax.random.key(0)), optimizer), batch)
    after, metrics = step(before, broken)
    assert gap(before["parameters"], after["parameters"]) == 0 and gap(before["optimizer"], after["optimizer"]) == 0
    assert int(after["step"]) == 2 and int(after["nonfinite"]) == 1 and float(metrics["nonfinite"]) == 1
    healed, metrics = step(after, batch)
    assert int(healed["nonfinite"]) == 0 and gap(after["parameters"], healed["parameters"]) > 0


def test_the_same_batch_is_learned():
    _, first = stepped(rows(8), optimizer=optax.adamw(1e-2))
    _, last = stepped(rows(8), 40, optax.adamw(1e-2))
    assert float(last["loss"]) < 0.5 * float(first["loss"])


def test_z_loss_is_reported_apart():
    _, metrics = stepped(rows(8))
    model = SPEC.build()
    params = model.init(jax.random.key(0))
    plain = CausalLMSpec().sums(model, params, rows(8), jnp.float32)
    np.testing.assert_allclose(metrics["loss"], plain.loss / plain.weight, rtol=1e-6)
    assert 0 < float(metrics["z_loss"]) < 0.1


def test_bfloat16_compute_tracks_float32():
    optimizer = optax.adamw(1e-2)
    wide, _ = stepped(rows(8), 20, optimizer)
    narrow, _ = stepped(rows(8), 20, optimizer, dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(narrow["parameters"]))
    model = SPEC.build()
    scores = [CausalLMSpec().sums(model, state["parameters"], rows(8), jnp.float32).loss for state in (wide, narrow)]
    np.testing.assert_allclose(scores[0], scores[1], rtol=0.05)


def test_a_batch_must_divide():
    layout = ParallelismSpec().build(jax.devices() * 3)
    with pytest.raises(ConfigError, match="32 does not divide over 3 devices; nearest valid: 30 or 33"):
        layout.check_batch(32, 1)
    with pytest.raises(ConfigError, match="3 devices × train.accumulate=2"):
        layout.check_batch(32, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mesh": {"data": 2}}, "data=2 does not make up the 1 devices"),
        ({"mesh": {"data": -1, "fsdp": -1}}, "parallelism.mesh.fsdp: sizes are at least 1, and at most one is -1"),
        ({"rules": {"embed": "fspd"}, "mesh": {"fsdp": -1}}, "no mesh axis 'fspd'; did you mean 'fsdp'"),
    ],
)
def test_a_mesh_must_fit(options, words):
    with pytest.raises(ConfigError) as error:
        ParallelismSpec(**options).build(jax.devices()[:1])
    assert words in str(error.value)


MANY_DEVICES = """
    import sys
    sys.path.insert(0, {folder!r})
    import jax, numpy as np, optax
    from jax.sharding import PartitionSpec as P
    from test_step import SPEC, rows, stepped
    from efficient_lm.objectives.causal_lm import CausalLMSpec
    from efficient_lm.training.parallelism import ParallelismSpec
    from efficient_lm.training.step import initial_state, make_step, state_shardings

    assert jax.device_count() == 4
    single, alone = stepped(rows(8), optimizer=optax.adamw(1e-2), steps=3, accumulate=2)
    for spec in (ParallelismSpec(), ParallelismSpec(mesh={{"data": 2, "fsdp": 2}}, rules={{"embed": "fsdp"}})):
        model, optimizer, layout = SPEC.build(), optax.adamw(1e-2), spec.build()
        shardings = state_shardings(model, optimizer, layout)
        begin = jax.jit(lambda key: initial_state(model.init(key), optimizer), out_shardings=shardings)
        state = begin(jax.random.key(0))
        step = make_step(model, CausalLMSpec(z_loss=1e-3), optimizer, accumulate=2)
        step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, layout.replicated))
        for _ in range(3):
            state, metrics = step(state, layout.batch(rows(8)))
        np.testing.assert_allclose(metrics["loss"], alone["loss"], rtol=1e-5)
        for part in ("mu", "nu"):
            moments = getattr(state["optimizer"][0], part)
            same = jax.tree.map(lambda m, p: m.sharding.spec == p.sharding.spec, moments, state["parameters"])
            assert all(jax.tree.leaves(same))
    query = state["parameters"]["stack"]["segment_0"]["layer_0"]["mixer"]["inner"]["query"]["weight"]
    assert query.sharding.spec == P(None, "fsdp", None, None), query.sharding.spec
    print("equal")
"""


@pytest.mark.slow
def test_devices_change_nothing(on_devices):
    assert on_devices(4, MANY_DEVICES.format(folder=str(Path(__file__).parent))) == "equal"
