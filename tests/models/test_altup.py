"""Several residual streams, the path beside a mixer, and layers' own embeddings, against their equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.models.block import BlockSpec
from efficient_lm.models.context import Context
from efficient_lm.models.layer_embedding import LayerEmbeddingSpec, LayerInputSpec
from efficient_lm.models.layers.laurel import LaurelSpec
from efficient_lm.models.layers.norms import RMSNormSpec
from efficient_lm.models.parameters import Blueprint, Initialization
from efficient_lm.models.streams.altup import AltUpSpec

WIDTH, COUNT, TIME = 8, 3, 5
ROWS, NORM, INIT = Context.rows(1, TIME), RMSNormSpec(), Initialization()
STREAMS = np.asarray(jax.random.normal(jax.random.key(5), (COUNT, 1, TIME, WIDTH)))


def rms(x, scale=1.0):
    return scale * x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)


def made(build, key=0):
    """A module, and its parameters, all of which matter."""
    blueprint = Blueprint(build)
    key = jax.random.key(key)
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.fold_in(key, leaf.size), leaf.shape), blueprint.init(key)
    )
    return blueprint(params), jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def modes(p, x):
    return np.tanh(rms(x, p["norm"]["scale"]) / WIDTH @ p["router"]["weight"])


@pytest.mark.parametrize("active", [0, 2])
def test_streams_are_predicted_and_corrected(active):
    altup, p = made(lambda: AltUpSpec(count=COUNT, active=active).build(WIDTH, INIT))
    coefficients = np.einsum("btm,mji->btji", modes(p, STREAMS[active]), p["prediction"]["weight"])
    want = STREAMS + np.einsum("btji,ibtd->jbtd", coefficients, STREAMS)
    read, kept = altup.read(jnp.asarray(STREAMS), ROWS)
    np.testing.assert_allclose(kept, want, atol=1e-5)
    np.testing.assert_array_equal(read, kept[active])
    y = np.sin(3 * want[active])
    share = modes(p, y) @ p["correction"]["weight"] + 1
    corrected = want + np.moveaxis(share, -1, 0)[..., None] * (y - want[active])
    np.testing.assert_allclose(altup.write(kept, jnp.asarray(y, jnp.float32), ROWS), corrected, atol=1e-5)
    more = np.asarray(altup.added(jnp.asarray(STREAMS), lambda stream: 2 * stream))
    np.testing.assert_allclose(more[1:], STREAMS[1:] + 2 * STREAMS[active], rtol=1e-6)
    np.testing.assert_array_equal(more[0], STREAMS[0])


def test_coefficients_are_bounded_while_training():
    built = {limit: made(lambda limit=limit: AltUpSpec(count=COUNT, coefficient_limit=limit).build(WIDTH, INIT))[0]
             for limit in (0.1, None)}  # fmt: skip
    training = Context(ROWS.positions, ROWS.segment_ids, key=jax.random.key(0))
    x = jnp.asarray(STREAMS)
    np.testing.assert_array_equal(built[0.1].read(x, ROWS)[1], built[None].read(x, training)[1])
    bounded, p = built[0.1].read(x, training)[1], made(lambda: AltUpSpec(count=COUNT).build(WIDTH, INIT))[1]
    weight = np.clip(p["prediction"]["weight"], -0.1, 0.1)
    assert np.abs(p["prediction"]["weight"]).max() > 0.1
    want = STREAMS + np.einsum("btm,mji,ibtd->jbtd", modes(p, STREAMS[0]), weight, STREAMS)
    np.testing.assert_allclose(bounded, want, atol=1e-5)


def test_the_ends_keep_the_magnitude_of_the_first():
    ends, p = made(lambda: AltUpSpec(count=COUNT).build_ends(WIDTH, INIT))

    def as_large(x, other):
        size = np.sqrt(np.mean(other**2, -1, keepdims=True))
        return x * size / np.sqrt(np.maximum(np.mean(x**2, -1, keepdims=True), 1e-5))

    x = STREAMS[0]
    want = np.stack([x, *(as_large(x @ w, x) for w in p["entry"])])
    np.testing.assert_allclose(ends.split(jnp.asarray(x)), want, atol=1e-5)
    others = [as_large(stream @ w, x) for stream, w in zip(STREAMS[1:], p["exit"], strict=True)]
    np.testing.assert_allclose(ends.joined(jnp.asarray(STREAMS)), np.mean([x, *others], axis=0), atol=1e-5)
    # An embedding of zeros has a gradient, though its magnitude is none.
    slope = jax.grad(lambda x: jnp.sum(ends.split(x) ** 2))(jnp.zeros_like(jnp.asarray(x)))
    assert np.all(np.isfinite(slope))
    one, none = made(lambda: AltUpSpec(count=1).build_ends(WIDTH, INIT))
    np.testing.assert_array_equal(one.joined(one.split(jnp.asarray(x))), x)
    assert none == {}


@pytest.mark.parametrize("form", ["added", "averaged"])
def test_a_path_beside_the_mixer(form):
    spec = LaurelSpec(rank=2, form=form)
    laurel, p = made(lambda: spec.build(WIDTH, NORM, INIT))
    mixed, x, read = STREAMS
    path = p["path"]["down"]["weight"] @ p["path"]["up"]["weight"]
    want = mixed + x @ path
    if form == "averaged":
        want = (mixed + read + rms(read @ path, p["norm"]["scale"])) / np.sqrt(2)
    np.testing.assert_allclose(laurel(*map(jnp.asarray, STREAMS)), want, atol=1e-5)
    assert spec.flops_per_token(WIDTH) == 2 * 2 * WIDTH * 2


def test_under_bfloat16_only_results_are_rounded():
    laurel, _ = made(lambda: LaurelSpec(rank=2, form="averaged").build(WIDTH, NORM, INIT))
    mixed = jnp.linspace(1, 2, 128, dtype=jnp.bfloat16).reshape(1, 16, WIDTH)
    none = jnp.zeros_like(mixed)
    want = (mixed.astype(jnp.float32) * np.sqrt(0.5)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(laurel(mixed, none, none), want)
    altup, _ = made(lambda: AltUpSpec(count=COUNT).build(WIDTH, INIT))
    kept, y = jnp.zeros((COUNT, *mixed.shape), jnp.bfloat16), jnp.sin(5 * mixed)
    rough, fine = altup.write(kept, y, ROWS), altup.write(kept.astype(jnp.float32), y.astype(jnp.float32), ROWS)
    assert rough.dtype == jnp.bfloat16
    # The coefficients are rounded once, and so is what they are multiplied with.
    np.testing.assert_allclose(rough.astype(jnp.float32), fine, rtol=2 * 2**-8)


def test_embeddings_of_each_layer():
    tables, p = made(lambda: LayerEmbeddingSpec(size=4, vocab_size=6).build(WIDTH, 2, 9, 0.5, INIT))
    tokens, x = np.array([[0, 5, 6, 8, 3]]), STREAMS[0]
    projected = np.einsum("btd,dle->btle", x, p["projection"]["weight"]) / np.sqrt(WIDTH)
    found = p["tokens"][np.where(tokens < 6, tokens, 0)] * 2
    want = (rms(projected, p["norm"]["scale"]) + found) / np.sqrt(2)
    inputs = np.asarray(tables(jnp.asarray(tokens), jnp.asarray(x)))
    np.testing.assert_allclose(np.moveaxis(inputs, 0, 2), want, atol=1e-5)
    reader, p = made(lambda: LayerInputSpec(size=4, activation="silu", scaled=True).build(WIDTH, NORM, INIT))
    gate = (x * p["scale"]) @ p["gate"]["weight"]
    want = rms(gate / (1 + np.exp(-gate)) * inputs[1] @ p["projection"]["weight"], p["norm"]["scale"])
    np.testing.assert_allclose(reader(jnp.asarray(x), jnp.asarray(inputs[1])), want, atol=1e-5)


@pytest.mark.slow
def test_a_block_of_them_all():
    """Streams around the halves, the path behind the mixer, the layer's own embedding behind them."""
    spec = BlockSpec.model_validate({
        "mixer": {"kind": "short_conv"}, "ffn": {"kind": "swiglu", "hidden": 8}, "norm_position": "sandwich",
        "laurel": {"rank": 2, "form": "averaged"}, "layer_input": {"size": 4},
        "streams": {"kind": "altup", "count": COUNT, "active": 1},
    })  # fmt: skip
    assert not list(spec.faults(WIDTH))
    block, _ = made(lambda: spec.build(WIDTH, INIT))
    own = jax.random.normal(jax.random.key(3), (1, TIME, 4))
    context = Context(ROWS.positions, ROWS.segment_ids, layer_inputs=own)
    x, kept = block.streams.read(jnp.asarray(STREAMS), context)
    y, _ = block.mixer(x, context, None)
    stream = block.laurel(x + y, x, block.mixer.input_norm(x))
    stream = stream + block.ffn(stream, context)[0]
    want = block.streams.write(kept, stream, context)
    want = want.at[1:].add(block.layer_input(want[1], own))
    np.testing.assert_allclose(block(jnp.asarray(STREAMS), context)[0], want, atol=1e-5)
    np.testing.assert_allclose(block.mixer_input(jnp.asarray(STREAMS), context), block.mixer.input_norm(x), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"streams": {"kind": "altup", "count": 2, "active": 2}}, "there is no stream 2 of 2; valid: 0 to 1"),
        ({"laurel": {}, "residual": "parallel"}, "is a path beside the mixer, and needs one"),
        ({"streams": {"kind": "altup"}, "depth": {"kind": "layer_drop"}}, "does not stack with streams"),
    ],
)
def test_faults(options, words):
    block = {"mixer": {"kind": "short_conv"}, "ffn": {"kind": "mlp"}, **options}
    assert words in str(list(BlockSpec.model_validate(block).faults(WIDTH)))
