"""Native sparse attention against masks written out in float64, one query at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.mixers.native_sparse import NativeSparseSpec
from efficient_lm.models.parameters import Blueprint, Initialization

WIDTH, TIME, BLOCK, WINDOW = 12, 80, 4, 5
LENGTHS = (1, 57, 3, 13)
SPEC = NativeSparseSpec(
    heads=4, kv_heads=2, head_size=6, block_size=BLOCK, selected_blocks=5, window=WINDOW, position={"kind": "none"}
)
MIXER = Blueprint(lambda: SPEC.build(WIDTH, Initialization()))


@pytest.fixture(scope="module")
def params(drawn):
    fresh = drawn(MIXER)
    assert np.all(np.asarray(fresh["compression"]) == 1 / BLOCK), "compressed keys start as the mean"
    return jax.tree.map(lambda leaf: 1.5 * leaf, drawn(MIXER, 0.2))


def inputs(time=TIME):
    return jax.random.normal(jax.random.key(2), (1, time, WIDTH))


def packed():
    """Documents of `LENGTHS` and some padding."""
    ids, positions = np.zeros((1, TIME), np.int32), np.zeros((1, TIME), np.int32)
    start = 0
    for number, length in enumerate(LENGTHS):
        ids[0, start : start + length] = number + 1
        positions[0, start : start + length] = range(length)
        start += length
    return Context(jnp.asarray(positions), jnp.asarray(ids))


def softmax(logits, seen):
    """Weights over what is seen, zero elsewhere and where nothing is."""
    powers = np.where(seen, np.exp(np.where(seen, logits, 0.0)), 0.0)
    return powers / powers.sum() if powers.any() else powers


def selected_of(t, scores):
    """Blocks that token t sees: its own, the one before, the first, and the best others."""
    own = t // BLOCK
    always = {own, own - 1, 0} if own else {0}
    others = sorted(set(range(own)) - always, key=lambda block: -scores[block])
    return sorted(always) + others[: max(SPEC.selected_blocks - len(always), 0)]


def of_a_document(x, p):
    """`x [time, width]` → `[time, width]`."""
    q, pair = (np.einsum("te,e...->t...", x, p[name]["weight"]) for name in ("query", "key_value"))
    k, v = pair[:, 0], pair[:, 1]
    gates = 1 / (1 + np.exp(-np.einsum("te,ech->tch", x, p["gate"]["weight"])))
    count, time = len(x) // BLOCK, np.arange(len(x))
    short_k, short_v = (
        np.einsum("npgd,pd->ngd", part[: count * BLOCK].reshape(count, BLOCK, 2, 6), weight)
        for part, weight in zip((k, v), p["compression"], strict=True)
    )
    y = np.zeros((len(x), 4, 6))
    for t in range(len(x)):
        complete = np.arange(count) * BLOCK + BLOCK - 1 <= t
        for group in range(2):
            heads = (2 * group, 2 * group + 1)
            weights = {h: softmax(short_k[:, group] @ q[t, h] / 6**0.5, complete) for h in heads}
            blocks = selected_of(t, sum(weights.values()))
            inside = np.isin(time // BLOCK, blocks) & (time <= t)
            near = (time <= t) & (t - time < WINDOW)
            for h in heads:
                logits = k[:, group] @ q[t, h] / 6**0.5
                parts = [weights[h] @ short_v[:, group]]
                parts += [softmax(logits, seen) @ v[:, group] for seen in (inside, near)]
                y[t, h] = gates[t, :, h] @ np.array(parts)
    return np.einsum("thd,hde->te", y, p["output"]["weight"])


def test_equals_dense_masks_document_by_document(params):
    x = inputs()
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    got, start = jax.jit(lambda params, x: MIXER(params)(x, packed())[0])(params, x), 0
    for length in LENGTHS:
        want = of_a_document(np.asarray(x[0, start : start + length], np.float64), wide)
        np.testing.assert_allclose(got[0, start : start + length], want, atol=2e-5 * np.abs(want).max())
        start += length


@pytest.mark.quick_for("pieces0")
@pytest.mark.parametrize("pieces", [(33, 1, 1, 10), (3, 30, 12)])
def test_decoding_continues_documents_from_the_cache(params, pieces):
    """Prompts come with padding on their left; a piece may complete several blocks, or none."""
    x = inputs(45)
    want = of_a_document(np.asarray(x[0], np.float64), jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params))
    run = jax.jit(lambda x, context, cache: MIXER(params)(x, context, cache))
    cache, made, start = MIXER(params).init_cache(1, 45, jnp.float32), [], 0
    for length in pieces:
        pad = 3 if start == 0 else 0
        index = jnp.arange(start - pad, start + length, dtype=jnp.int32)[None]
        context = Context(jnp.maximum(index, 0), (index >= 0).astype(jnp.int32), "decode" if start else "prefill")
        piece = jnp.pad(x[:, start : start + length], ((0, 0), (pad, 0), (0, 0)), constant_values=1.0)
        y, cache = run(piece, context, cache)
        made.append(y[:, pad:])
        start += length
    np.testing.assert_allclose(jnp.concatenate(made, 1)[0], want, atol=2e-5 * np.abs(want).max())
    assert int(cache["blocks"][0]) == 45 // BLOCK


def arrays_of(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from arrays_of(inner)


def test_no_token_meets_all_others():
    """Nothing as large as one head's matrix of all pairs is ever made, in either pass."""
    time, mixer = (
        4096,
        Blueprint(
            lambda: NativeSparseSpec(
                heads=2, kv_heads=1, head_size=4, block_size=16, selected_blocks=4, window=16
            ).build(WIDTH, Initialization())
        ),
    )
    params = jax.eval_shape(mixer.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, time, WIDTH), jnp.float32)
    loss = jax.grad(lambda params, x: mixer(params)(x, Context.rows(1, time))[0].sum())
    largest = max(aval.size for aval in arrays_of(jax.make_jaxpr(loss)(params, x).jaxpr))
    assert time < largest < time**2 / 8


@pytest.mark.slow
def test_every_parameter_learns(params):
    gradients = jax.jit(jax.grad(lambda params, x: jnp.sum(MIXER(params)(x, packed())[0] ** 2)))(params, inputs())
    assert all(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(gradients))


def test_cost_by_hand():
    # 10 tokens see 0 0 0 1 1 1 1 2 2 2 compressed keys, the window 1 2 3 4 5 5 5 5 5 5 and as selected all before.
    keys = 1.0 + 5.5 + 4.0
    maps = 6 * 2 * (4 + 2) + 3 * 4
    assert SPEC.flops_per_token(WIDTH, 10) == pytest.approx(2 * WIDTH * maps + 4 * 4 * 6 * keys)
    longer = SPEC.flops_per_token(WIDTH, 20_000) - SPEC.flops_per_token(WIDTH, 10_000)
    assert longer == pytest.approx(4 * 4 * 6 * 10_000 / 2 / BLOCK, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 5}, "mixer.heads: 5 heads do not divide width 12; nearest that do: 3, 4, 6, or set head_size"),
        ({"heads": 4, "kv_heads": 3}, "mixer.kv_heads: 3 do not divide 4 heads; nearest"),
        ({"position": {"kind": "alibi"}}, "mixer.position: 'alibi' adds to the logits of every pair"),
    ],
)
def test_faults_name_the_key(options, words):
    blocks = {"layer": {"mixer": {"kind": "native_sparse", **options}}}
    with pytest.raises(ConfigError) as error:
        ModelSpec.model_validate({"width": WIDTH, "vocab_size": 9, "blocks": blocks, "layout": ["layer"]})
    assert words in str(error.value)
