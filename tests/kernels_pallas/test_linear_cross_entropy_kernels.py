"""Linear cross-entropy by kernels, in the simulators of both targets: against the definition in float64."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear_cross_entropy import linear_cross_entropy, recomputed
from kernels_pallas.target import Target, compiling_for, simulating

VOCABULARY = 300
# Several tiles of tokens, of the vocabulary and of the contraction, and more steps of each than slots.
BLOCKS = {
    "gpu": {"rows": 64, "stages": 2, "runs": 2, "chunk": 40},
    "tpu": {"tokens": 32, "vocabulary": 128, "inputs": 128, "chunk": 40},
}
BOUNDS = {jnp.bfloat16: (1e-5, 8e-3), jnp.float32: (1e-5, 1e-4)}
pytestmark = pytest.mark.usefixtures("without_races")


@pytest.fixture(params=["gpu", "tpu"])
def platform(request, monkeypatch):
    held = importlib.import_module(f"kernels_pallas.linear_cross_entropy.mosaic_{request.param}")
    monkeypatch.setattr(held, "heuristic", lambda x, w: BLOCKS[request.param])
    return request.param


def inputs(dtype, tokens=90, width=136, scale=1.0):
    generator = np.random.default_rng(0)
    x, w = generator.normal(size=(tokens, width)) * scale, generator.normal(size=(width, VOCABULARY)) / 6
    x, w = jnp.asarray(x, dtype), jnp.asarray(jnp.asarray(w, dtype), jnp.float32)
    labels = generator.integers(0, VOCABULARY, tokens)
    labels[: tokens // 2] = np.argmax(np.asarray(x, np.float64) @ np.asarray(w, np.float64), axis=1)[: tokens // 2]
    weights = generator.uniform(size=tokens)
    weights[[3, 4]], labels[[3, 4]] = 0, (-100, VOCABULARY)
    return {"x": x, "w": w, "labels": jnp.asarray(labels, jnp.int32), "weights": jnp.asarray(weights, jnp.float32)}


def by_kernel(results, platform, values, **options):
    with simulating(platform):
        return results(functools.partial(linear_cross_entropy, implementation="pallas", **options), values)


def by_definition(results, values, **options):
    with jax.enable_x64(True):
        wide = {name: np.asarray(value, np.float64) for name, value in values.items() if name != "labels"}
        values = jax.tree.map(jnp.asarray, wide | {"labels": np.asarray(values["labels"])})
        return results(functools.partial(linear_cross_entropy, implementation="reference", **options), values)


def assert_close(got, wanted, dtype, error):
    outside = [3, 4]  # of tokens that have no label, the gradient in the weight means nothing
    for found in (got, wanted):
        found["dweights"] = np.delete(found["dweights"], outside)
    assert set(got) == set(wanted)
    value_bound, gradient_bound = BOUNDS[dtype]
    for name in wanted:
        assert error(got[name], wanted[name]) < (gradient_bound if name in ("dx", "dw") else value_bound), name
    assert np.all(got["dx"][outside] == 0)


@pytest.mark.parametrize(("dtype", "softcap", "chunk"), [(jnp.bfloat16, None, 90), (jnp.float32, 3.0, None)])
def test_sums_and_gradients(platform, dtype, softcap, chunk, results, error):
    values = inputs(dtype)
    got = by_kernel(results, platform, values, softcap=softcap, chunk=chunk)
    wanted = by_definition(results, values, softcap=softcap)
    assert wanted["3"] > 3, "hits"
    assert_close(got, wanted, dtype, error)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("tokens", "width"), [(5, 24), (64, 64), (129, 200)])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_more_sizes(platform, tokens, width, softcap, dtype, results, error):
    values = inputs(dtype, tokens, width)
    got, wanted = by_kernel(results, platform, values, softcap=softcap), by_definition(results, values, softcap=softcap)
    assert_close(got, wanted, dtype, error)


def test_huge_logits(platform, results, error):
    values = inputs(jnp.float32, tokens=20, width=64, scale=1e4)
    got, wanted = by_kernel(results, platform, values), by_definition(results, values)
    assert error(got["0"], wanted["0"]) < 1e-5 and error(got["1"], wanted["1"]) < 1e-5
    assert all(np.all(np.isfinite(value)) for value in got.values())


@pytest.mark.slow
def test_logits_far_below_zero(platform, results, error):
    """Columns that only fill a tile, where a logit would be 0, neither count nor overflow."""
    values = inputs(jnp.float32, tokens=10, width=64)
    w = jnp.asarray(values["w"] - 2, jnp.bfloat16)  # of which halves lose nothing, as logits of -128 would show it
    values |= {"x": jnp.ones((10, 64)), "w": w.astype(jnp.float32)}
    assert_close(by_kernel(results, platform, values), by_definition(results, values), jnp.float32, error)


@pytest.mark.slow
def test_the_same_bits_twice(platform, results):
    values = inputs(jnp.bfloat16, tokens=70, width=64)
    once, again = (by_kernel(results, platform, values) for _ in range(2))
    for name in once:
        np.testing.assert_array_equal(once[name], again[name])


def gradient(x, w, labels, weights):
    def loss(x, w, weights):
        sums = linear_cross_entropy(x, w, labels, weights, softcap=30.0, implementation="pallas")
        return sums.loss_sum + 1e-4 * sums.z_loss_sum

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(x, w, weights)


def shapes(dtype, tokens=16384, width=2048, vocabulary=50304):
    sizes = {(tokens, width): dtype, (width, vocabulary): jnp.float32}
    of_tokens = [jax.ShapeDtypeStruct((tokens,), kind) for kind in (jnp.int32, jnp.float32)]
    return *(jax.ShapeDtypeStruct(size, kind) for size, kind in sizes.items()), *of_tokens


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_lowering_for_hopper(dtype, lowered_for_hopper):
    assert lowered_for_hopper(gradient, *shapes(dtype)).count("mosaic_gpu") >= 2


@pytest.mark.parametrize("target", [Target("gpu", "NVIDIA H200", hopper=True), Target("tpu", "TPU v5")])
def test_the_gradient_is_made_of_our_kernels_without_all_logits(target):
    with compiling_for(target):
        program = str(jax.make_jaxpr(gradient)(*shapes(jnp.bfloat16)))
    assert "name=linear_cross_entropy\n" in program or "name=linear_cross_entropy " in program
    assert "name=linear_cross_entropy_pull" in program
    assert "16384,50304" not in program


@pytest.mark.parametrize(("tokens", "vocabulary"), [(16384, 131072), (8192, 50304), (3, 50), (1, 10**9)])
def test_logits_alive_in_the_gradient(tokens, vocabulary):
    chunk = recomputed.default_chunk(tokens, vocabulary)
    assert chunk >= 1
    assert chunk == 1 or 8 * chunk <= tokens and chunk * vocabulary <= 2**27
    assert recomputed.parts(tokens, chunk) * chunk >= tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((4, 3), np.float64)}, "x of dtype float64"),
        ({"w": np.zeros((3, 0), np.float32)}, "an empty array"),
    ],
)
def test_what_kernels_cannot_do_is_refused(changes, message):
    arguments = {"x": np.zeros((4, 3), np.float32), "w": np.zeros((3, 5), np.float32)} | changes
    with simulating("tpu"), pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments, labels=np.zeros(4, int), weights=np.ones(4), implementation="pallas")


def test_a_processor_runs_no_kernel():
    arguments = np.zeros((4, 3), np.float32), np.zeros((3, 5), np.float32), np.zeros(4, int), np.ones(4, np.float32)
    with pytest.raises(ValueError, match="Pallas kernels run on TPUs and on NVIDIA Hopper GPUs"):
        linear_cross_entropy(*arguments, implementation="pallas")
