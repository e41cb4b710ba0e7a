"""Linear cross-entropy: chunks against the definition, and the definition against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear_cross_entropy import linear_cross_entropy, xla

TOKENS, WIDTH, VOCABULARY = 22, 8, 50


def inputs(dtype=np.float64, scale=1.0):
    generator = np.random.default_rng(0)
    x, w = generator.normal(size=(TOKENS, WIDTH)) * scale, generator.normal(size=(WIDTH, VOCABULARY))
    labels, weights = generator.integers(0, VOCABULARY, TOKENS), generator.uniform(size=TOKENS)
    labels[:12] = np.argmax(x[:12] @ w, axis=1)
    weights[[3, 4, 17]] = 0
    return x.astype(dtype), w.astype(dtype), labels.astype(np.int32), weights.astype(np.float32)


def in_numpy(x, w, labels, weights, softcap=None):
    x, w, weights = (np.asarray(value, np.float64) for value in (x, w, weights))
    logits = x @ w
    logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
    top = logits.max(axis=1)
    normaliser = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    losses = normaliser - logits[np.arange(len(labels)), labels]
    hits = logits.argmax(axis=1) == labels
    return [weights @ losses, weights @ normaliser**2, weights.sum(), weights @ hits]


def error(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    return np.sqrt(np.mean((got - wanted) ** 2)) / max(np.sqrt(np.mean(wanted**2)), 1e-6)


def quick(function):
    """`jax.jit` that compiles fast: compiling takes all the time here."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def summed(arrays, **options):
    return quick(functools.partial(linear_cross_entropy, **options))(*arrays)


def gradients(arrays, coefficient, **options):
    """Of loss_sum + coefficient * z_loss_sum, in x, w and weights."""
    x, w, labels, weights = (jnp.asarray(value) for value in arrays)

    @quick
    @jax.grad
    def gradient(learned):
        sums = linear_cross_entropy(*learned[:2], labels, learned[2], **options)
        return sums.loss_sum + coefficient * sums.z_loss_sum

    return gradient((x, w, weights))


@pytest.mark.parametrize(
    ("chunk", "softcap"), [(None, None), (None, 3.0), (1, None), (5, 3.0), (11, None), (100, None)]
)
def test_values_in_float64(chunk, softcap):
    with jax.enable_x64(True):
        reference = summed(inputs(), softcap=softcap, implementation="reference")
        chunked = summed(inputs(), softcap=softcap, implementation="xla", chunk=chunk)
    wanted = in_numpy(*inputs(), softcap)
    assert wanted[3] > 3
    assert error(reference, wanted) < 1e-12
    assert error(chunked, wanted) < 1e-12


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize(("z_loss", "coefficient"), [(0.0, 0.0), (1e-2, 1e-2), (0.0, 0.3), (0.3, 0.0)])
def test_gradients_in_float64(chunk, softcap, z_loss, coefficient):
    with jax.enable_x64(True):
        wanted = gradients(inputs(), coefficient, softcap=softcap, implementation="reference")
        got = gradients(inputs(), coefficient, softcap=softcap, z_loss=z_loss, chunk=chunk, implementation="xla")
    assert all(error(*pair) < 1e-11 for pair in zip(got, wanted, strict=True))


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.bfloat16, 8e-3)])
@pytest.mark.parametrize("implementation", ["xla", "auto"])
def test_narrow_hidden_states_with_a_float32_head(implementation, dtype, bound):
    x, w, labels, weights = inputs(np.float32)
    x = jnp.asarray(x, dtype)
    w = jnp.asarray(jnp.asarray(w, dtype), jnp.float32)
    chunk = 5 if implementation == "xla" else None
    options = {"chunk": chunk, "implementation": implementation}
    sums = summed((x, w, labels, weights), **options)
    assert all(value.dtype == jnp.float32 for value in sums)
    assert error(sums, in_numpy(np.asarray(x, np.float64), w, labels, weights)) < 1e-5
    got = gradients((x, w, labels, weights), 0.0, **options)
    wanted = gradients((x.astype(jnp.float32), w, labels, weights), 0.0, implementation="reference")
    assert [value.dtype for value in got] == [dtype, jnp.float32, jnp.float32]
    assert all(error(*pair) < bound for pair in zip(got, wanted, strict=True))


def test_the_head_gradient_accumulates_in_float32():
    """As many chunks as tokens, all adding nearly the same: a bfloat16 sum would stop growing."""
    tokens = 1024
    x, labels = jnp.ones((tokens, 2), jnp.bfloat16), jnp.zeros(tokens, jnp.int32)
    _, dw, _ = gradients((x, jnp.zeros((2, 3)), labels, jnp.ones(tokens)), 0.0, chunk=1, implementation="xla")
    assert error(dw, tokens * np.array([[-2, 1, 1], [-2, 1, 1]]) / 3) < 5e-3


@pytest.mark.parametrize("chunk", [None, 5])
def test_tokens_without_weight_do_not_count_whatever_their_label(chunk):
    x, w, labels, weights = inputs(np.float32)
    labels[[3, 4]], x[17] = (-100, VOCABULARY), 1e4
    kept = weights > 0
    options = {"chunk": chunk, "z_loss": 1e-3, "implementation": "xla"}
    sums = summed((x, w, labels, weights), **options)
    assert error(sums, in_numpy(x[kept], w, labels[kept], weights[kept])) < 1e-5
    dx, dw, _ = gradients((x, w, labels, weights), 1e-3, **options)
    wanted = gradients((x[kept], w, labels[kept], weights[kept]), 1e-3, implementation="reference")
    assert np.all(np.asarray(dx)[~kept] == 0)
    assert error(np.asarray(dx)[kept], wanted[0]) < 1e-5
    assert error(dw, wanted[1]) < 1e-5


@pytest.mark.parametrize("chunk", [None, 5])
def test_huge_logits(chunk):
    arrays = inputs(np.float32, scale=1e4)
    sums = summed(arrays, chunk=chunk, implementation="xla")
    assert error(sums, in_numpy(*arrays)) < 1e-5
    assert all(np.all(np.isfinite(value)) for value in gradients(arrays, 0.0, chunk=chunk, implementation="xla"))


def compiled(tokens, vocabulary, tied=False, **options):
    """The compiled loss and gradient in x and w."""
    shapes = [(tokens, 16), (vocabulary, 16) if tied else (16, vocabulary), (tokens,), (tokens,)]
    dtypes = [jnp.float32, jnp.float32, jnp.int32, jnp.float32]

    def loss(x, w, labels, weights):
        return linear_cross_entropy(x, w.T if tied else w, labels, weights, **options).loss_sum

    arguments = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()


def test_chunks_bound_the_memory():
    logits = 4 * 4096 * 2048
    whole, chunked, tied = (
        compiled(4096, 2048, implementation="xla", **options).memory_analysis().temp_size_in_bytes
        for options in ({}, {"chunk": 256}, {"chunk": 256, "tied": True})
    )
    assert whole > 0.9 * logits
    assert chunked < 0.25 * logits
    assert tied < 0.25 * logits


def test_default_chunk():
    assert xla.default_chunk(2048, 4096, "cpu") == 512
    assert xla.default_chunk(100, 4096, "cpu") == 100
    assert xla.default_chunk(2048, 256, "cpu") == 2048
    assert xla.default_chunk(8192, 50304, "gpu") == 8192
    assert 1024 <= xla.default_chunk(65536, 131072, "gpu") < 65536


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, np.zeros(22), "x must be"),
        (1, np.zeros((7, 50)), r"w must be \[8, vocabulary\], not shape \(7, 50\)"),
        (2, np.zeros(21, np.int32), "labels must have shape"),
        (2, np.zeros(22), "labels must be integers"),
        (3, np.zeros((22, 1)), "weights must have shape"),
    ],
)
def test_wrong_arguments_are_named(position, value, message):
    arguments = list(inputs(np.float32))
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*arguments)


def test_what_cannot_be_honoured_is_refused():
    with pytest.raises(ValueError, match="'reference' cannot honour chunk; can: xla"):
        linear_cross_entropy(*inputs(np.float32), chunk=4, implementation="reference")
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        linear_cross_entropy(*inputs(np.float32), chunk=0)
    with pytest.raises(ValueError, match="no implementation 'cudnn'; valid: auto, xla, reference"):
        linear_cross_entropy(*inputs(np.float32), implementation="cudnn")
