"""Attention against a loop over rows in NumPy float64, and its gradients against those of the definition."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from kernels_pallas import dispatch
from kernels_pallas.attention import attention, blocks, cudnn, xla

BATCH, TIME, HEADS, GROUPS, WIDTH, VALUE_WIDTH = 2, 19, 4, 2, 8, 6

SEGMENTS = np.array([[1] * 2 + [2] * 10 + [3] + [4] * 4 + [0] * 2, [0] * 3 + [7] * 6 + [2] * 10], np.int32)
SHUFFLED = np.stack([np.random.default_rng(row).permutation(TIME) for row in range(BATCH)]).astype(np.int32)
GENERATOR = np.random.default_rng(0)
BIAS = GENERATOR.normal(size=(BATCH, HEADS, TIME, TIME))
SINKS = GENERATOR.normal(size=HEADS)
PREFIX = np.array([0, 11], np.int32)

CASES = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 5},
    "window both sides": {"causal": False, "window": 5},
    "window kept": {"window": 5, "kept": 3},
    "window kept both sides": {"window": 2, "kept": 6, "causal": False},
    "sinks softcap": {"sinks": SINKS, "softcap": 2.0},
    "prefix": {"prefix_length": PREFIX},
    "prefix window": {"prefix_length": PREFIX, "window": 4},
    "bias": {"bias": BIAS, "softcap": 3.0, "scale": 0.7},
    "shared bias": {"bias": BIAS[:1, :1], "window": 9, "kept": 2},
    "bias per head": {"bias": BIAS[:1], "causal": False},
    "segments": {"segment_ids": SEGMENTS},
    "segments full": {"segment_ids": SEGMENTS, "causal": False, "sinks": SINKS},
    "segments window": {"segment_ids": SEGMENTS, "window": 3},
    "segments window kept": {"segment_ids": SEGMENTS, "window": 3, "kept": 2},
    "segments prefix": {"segment_ids": SEGMENTS, "prefix_length": PREFIX},
    "positions": {"query_positions": SHUFFLED, "key_positions": SHUFFLED[:, ::-1]},
    "positions window kept": {"query_positions": SHUFFLED, "key_positions": SHUFFLED[::-1], "window": 6, "kept": 2},
    "everything": {
        "window": 6,
        "kept": 2,
        "sinks": SINKS,
        "softcap": 2.0,
        "prefix_length": PREFIX,
        "bias": BIAS,
        "scale": 0.5,
        "segment_ids": SEGMENTS,
    },
}


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    """Four blocks of four queries in loops, and a rest of three, so that every kind of band occurs."""
    if "default_blocks" not in request.fixturenames:
        monkeypatch.setattr(blocks, "MOST_BANDS", 2)
        monkeypatch.setattr(xla, "default_block", lambda time, backend: 4)


@pytest.fixture
def default_blocks():
    """Asks for the blocks users get."""
    return xla.default_block


def inputs(dtype=np.float64, time=TIME, keys=TIME, scale=1.0, groups=GROUPS):
    generator = np.random.default_rng(1)
    shapes = [(time, HEADS, WIDTH), (keys, groups, WIDTH), (keys, groups, VALUE_WIDTH), (time, HEADS, VALUE_WIDTH)]
    return [np.asarray(scale * generator.normal(size=(BATCH, *shape)), dtype) for shape in shapes]


def sees(i, j, causal, window, near_start, prefix):
    """Whether a query of position i sees a key of position j of its own document."""
    inside = window is None or (abs(i - j) < window) or near_start
    return j < prefix or (inside and (j <= i or not causal))


def oracle(q, k, v, causal=True, window=None, kept=0, sinks=None, softcap=None, prefix_length=None, bias=None,
           scale=None, segment_ids=None, query_positions=None, key_positions=None, key_segment_ids=None):  # fmt: skip
    """Row by row, key by key."""
    (batch, time, heads, width), (_, keys, groups, value_width) = q.shape, v.shape
    scale = width**-0.5 if scale is None else scale
    y = np.zeros((batch, time, heads, value_width))
    if key_segment_ids is None:
        key_segment_ids = segment_ids
    for b, t, h in np.ndindex(batch, time, heads):
        i = t + keys - time if query_positions is None else query_positions[b, t]
        rows, logits = [], []
        for s in range(keys):
            j = s if key_positions is None else key_positions[b, s]
            first = j < kept
            if segment_ids is not None:
                if segment_ids[b, t] != key_segment_ids[b, s] or segment_ids[b, t] == 0:
                    continue
                if key_positions is None:
                    first = np.sum(key_segment_ids[b, :s] == key_segment_ids[b, s]) < kept
            if not sees(i, j, causal, window, first, 0 if prefix_length is None else prefix_length[b]):
                continue
            logit = scale * (q[b, t, h] @ k[b, s, h // (heads // groups)])
            logit = logit if softcap is None else softcap * np.tanh(logit / softcap)
            if bias is not None:
                logit += bias[min(b, bias.shape[0] - 1), min(h, bias.shape[1] - 1), t, s]
            rows.append(v[b, s, h // (heads // groups)])
            logits.append(logit)
        if logits:
            top = max(logits + ([] if sinks is None else [sinks[h]]))
            weights = np.exp(np.array(logits) - top)
            total = weights.sum() + (0 if sinks is None else np.exp(sinks[h] - top))
            y[b, t, h] = weights @ np.array(rows) / total
    return y


def error(got, wanted):
    """Relative root mean square; NaN anywhere fails every comparison."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    return np.sqrt(np.mean((got - wanted) ** 2)) / max(np.sqrt(np.mean(wanted**2)), 1e-6)


def quick(function):
    """`jax.jit` that compiles fast: compiling takes all the time here."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def attend(q, k, v, **options):
    """The operator, compiled as a whole."""
    static = {name: value for name, value in options.items() if not isinstance(value, np.ndarray)}
    arrays = {name: value for name, value in options.items() if name not in static}
    return quick(lambda q, k, v, arrays: attention(q, k, v, **arrays, **static))(q, k, v, arrays)


def with_gradients(arrays, options, implementation, dtype=None):
    """Output, and gradients of sum(y * dy) in q, k, v and, where given, sinks and bias."""
    learned = {name: jnp.asarray(options[name], dtype) for name in ("sinks", "bias") if name in options}
    fixed = {name: value for name, value in options.items() if name not in learned}

    def run(q, k, v, learned):
        return attention(q, k, v, **learned, **fixed, implementation=implementation)

    @quick
    def both(q, k, v, dy, learned):
        y, pull = jax.vjp(run, q, k, v, learned)
        return y, pull(dy)

    y, (dq, dk, dv, dlearned) = both(*(jnp.asarray(x, dtype) for x in arrays), learned)
    return {"y": y, "q": dq, "k": dk, "v": dv, **dlearned}


@pytest.mark.parametrize("case", CASES)
def test_float64_equals_the_loop_and_its_gradients_the_definition(case):
    options, arrays = CASES[case], inputs()
    with jax.enable_x64(True):
        reference = with_gradients(arrays, options, "reference")
        blocked = with_gradients(arrays, options, "xla")
    wanted = oracle(*arrays[:3], **options)
    assert error(reference["y"], wanted) < 1e-12
    assert error(blocked["y"], wanted) < 1e-12
    for name in reference:
        assert error(blocked[name], reference[name]) < 1e-11, name


def merged(parts):
    """Attention to all keys from (y, lse) of attention to some of them."""
    largest = jnp.maximum(*(lse for _, lse in parts))
    weights = [jnp.exp(lse - largest)[..., None] for _, lse in parts]
    return sum(w * y for w, (y, _) in zip(weights, parts, strict=True)) / sum(weights)


@pytest.mark.parametrize(
    ("implementation", "half"),
    [
        ("xla", TIME // 2),
        pytest.param("xla", 0, marks=pytest.mark.slow),
        pytest.param("reference", TIME // 2, marks=pytest.mark.slow),
    ],
)
def test_logsumexps_merge_parts_over_keys_with_gradients(implementation, half):
    first = np.arange(TIME) < half  # none of the keys, for half = 0
    ids = {"segment_ids": np.ones((BATCH, TIME), np.int32)}
    parts = [np.broadcast_to(np.where(part, 1, 2), (BATCH, TIME)).astype(np.int32) for part in (first, ~first)]

    def run(q, k, v, sinks, split):
        options = {"implementation": implementation, "softcap": 2.0, "causal": False, "return_lse": True}
        if not split:
            y, lse = attention(q, k, v, sinks=sinks, **options)
            assert lse.shape == (BATCH, TIME, HEADS)
            return y
        one, two = (attention(q, k, v, key_segment_ids=part, **ids, **options) for part in parts)
        joined = merged([one, two])
        lse = jnp.logaddexp(one[1], two[1])
        return joined / (1 + jnp.exp(sinks - lse))[..., None]  # the sink joins the denominator

    with jax.enable_x64(True):
        *arrays, dy = (jnp.asarray(x) for x in inputs())
        whole, pull = jax.vjp(lambda *x: run(*x, split=False), *arrays, jnp.asarray(SINKS))
        halves, pull_halves = jax.vjp(lambda *x: run(*x, split=True), *arrays, jnp.asarray(SINKS))
        assert error(halves, whole) < 1e-12
        assert all(error(got, wanted) < 1e-11 for got, wanted in zip(pull_halves(dy), pull(dy), strict=True))


@pytest.mark.parametrize("sinks", [None, SINKS])
def test_logsumexps_and_their_gradients_of_both_forms_agree(sinks):
    def run(implementation):
        def loss(q, k, v, sinks):
            options = {"window": 5, "segment_ids": SEGMENTS, "return_lse": True, "implementation": implementation}
            y, lse = attention(q, k, v, sinks=sinks, **options)
            return jnp.sum(y[..., 0]) + jnp.sum(jnp.where(lse < -1e19, 0, lse) ** 2), lse

        arrays = [jnp.asarray(x) for x in inputs()[:3]] + [None if sinks is None else jnp.asarray(sinks)]
        given = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
        (_, lse), gradients = quick(jax.value_and_grad(loss, given, has_aux=True))(*arrays)
        return [np.asarray(x) for x in (lse, *gradients)]

    with jax.enable_x64(True):
        wanted, got = run("reference"), run("xla")
    nothing = np.broadcast_to((SEGMENTS == 0)[..., None], wanted[0].shape)
    assert np.all(wanted[0][nothing] == (-1e20 if sinks is None else np.broadcast_to(SINKS, nothing.shape)[nothing]))
    assert all(error(a, b) < 1e-11 for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(("dtype", "output", "gradient"), [(jnp.float32, 1e-5, 1e-4), (jnp.bfloat16, 5e-3, 8e-3)])
@pytest.mark.parametrize("case", ["causal", "everything"])
def test_narrow_dtypes(case, dtype, output, gradient):
    options = CASES[case]
    rounded = [np.asarray(jnp.asarray(x, dtype), np.float32) for x in inputs()]
    wanted = with_gradients(rounded, options, "reference", jnp.float32)
    for implementation in ("xla", "reference"):
        got = with_gradients(rounded, options, implementation, dtype)
        assert got["y"].dtype == got["k"].dtype == dtype
        for name in wanted:
            learned = name in ("sinks", "bias")  # rounding these is no error of the operator
            bound = 2e-2 if learned and dtype == jnp.bfloat16 else output if name == "y" else gradient
            assert error(got[name], wanted[name]) < bound, (implementation, name)


@pytest.mark.parametrize("groups", [1, 4])
def test_one_group_and_as_many_groups_as_heads(groups):
    arrays = inputs(groups=groups)
    with jax.enable_x64(True):
        got = with_gradients(arrays, {"window": 7}, "xla")
        wanted = with_gradients(arrays, {"window": 7}, "reference")
    assert error(got["y"], oracle(*arrays[:3], window=7)) < 1e-12
    assert all(error(got[name], wanted[name]) < 1e-11 for name in wanted)


@pytest.mark.parametrize(("time", "keys"), [(1, 19), (5, 19), (9, 3)])
@pytest.mark.parametrize("options", [{}, {"window": 3, "kept": 2}, {"causal": False}], ids=str)
def test_queries_are_the_last_of_the_keys(time, keys, options):
    arrays = inputs(time=time, keys=keys)
    with jax.enable_x64(True):
        got = with_gradients(arrays, options, "xla")
        wanted = with_gradients(arrays, options, "reference")
    assert error(got["y"], oracle(*arrays[:3], **options)) < 1e-12
    assert all(error(got[name], wanted[name]) < 1e-11 for name in wanted)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_decoding_from_a_ring_buffer_equals_the_last_row(groups):
    q, k, v, _ = inputs(groups=groups)
    options = {"window": 8, "kept": 2, "sinks": SINKS, "softcap": 2.0, "bias": BIAS}
    slots = np.array([np.roll(np.r_[0:2, TIME - 8 : TIME], shift) for shift in (3, 7)], np.int32)
    pick = np.arange(BATCH)[:, None], slots
    padded = [np.pad(x[pick], [(0, 0), (0, 2), (0, 0), (0, 0)]) for x in (k, v)]
    bias = np.stack([BIAS[row, :, -1:, slots[row]].transpose(1, 2, 0) for row in range(BATCH)])
    with jax.enable_x64(True):
        one = attend(
            q[:, -1:],
            *padded,
            **{**options, "bias": np.pad(bias, [(0, 0), (0, 0), (0, 0), (0, 2)])},
            query_positions=np.full((BATCH, 1), TIME - 1, np.int32),
            key_positions=np.pad(slots, [(0, 0), (0, 2)]),
            segment_ids=np.ones((BATCH, 1), np.int32),
            key_segment_ids=np.pad(np.ones_like(slots), [(0, 0), (0, 2)]),
            implementation="xla",
        )
    assert error(one, oracle(q, k, v, **options)[:, -1:]) < 1e-12


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_packed_documents_equal_documents_alone(implementation):
    q, k, v, _ = inputs(np.float32)
    options = {"window": 4, "kept": 2}
    packed = np.asarray(attend(q, k, v, segment_ids=SEGMENTS, implementation=implementation, **options))
    for row, ids in enumerate(SEGMENTS):
        for document in set(ids) - {0}:
            here = ids == document
            alone = oracle(*(x[row : row + 1, here] for x in (q, k, v)), **options)
            assert error(packed[row, here], alone[0]) < 1e-5
    assert np.all(packed[SEGMENTS == 0] == 0)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_future_changes_nothing_before(implementation):
    q, k, v, _ = inputs(np.float32)
    before = attend(q, k, v, window=9, kept=1, implementation=implementation)
    k[:, 10:], v[:, 10:] = 50.0, -50.0
    after = attend(q, k, v, window=9, kept=1, implementation=implementation)
    assert np.array_equal(before[:, :10], after[:, :10])
    assert not np.allclose(before[:, 10:], after[:, 10:])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("sinks", [None, SINKS])
def test_rows_that_see_nothing_are_zero_with_finite_gradients(implementation, sinks):
    options = {"segment_ids": np.zeros((BATCH, TIME), np.int32)} | ({} if sinks is None else {"sinks": sinks})
    got = with_gradients(inputs(), options, implementation, jnp.float32)
    assert all(np.all(np.asarray(value) == 0) for value in got.values())


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("masked", [-np.inf, np.finfo(np.float32).min])
def test_a_bias_may_mask(implementation, masked):
    causal = np.where(np.tril(np.ones((TIME, TIME), bool)), 0, masked)[None, None].astype(np.float32)
    arrays = inputs(np.float32)
    got = with_gradients(arrays, {"causal": False, "bias": causal}, implementation)
    wanted = with_gradients(arrays, {}, implementation)
    assert all(error(got[name], wanted[name]) < 1e-5 for name in wanted)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_huge_logits(implementation):
    q, k, v, dy = inputs()
    arrays = [100 * q, 100 * k, v, dy]
    assert np.abs(np.einsum("bthk,bshk->bhts", arrays[0][:, :, ::2], arrays[1])).max() > 1e4
    with jax.enable_x64(True):
        wanted = with_gradients(arrays, {"sinks": SINKS}, "reference")
        got = with_gradients(arrays, {"sinks": SINKS}, implementation)
    narrow = with_gradients(arrays, {"sinks": SINKS}, implementation, jnp.float32)
    assert error(wanted["y"], oracle(*arrays[:3], sinks=SINKS)) < 1e-12
    # Saturated rows have gradients that are differences of near-equal numbers.
    assert all(error(got[name], wanted[name]) < 1e-9 for name in wanted)
    assert all(np.all(np.isfinite(value)) for value in narrow.values())
    assert error(narrow["y"], wanted["y"]) < 1e-2


def test_the_same_call_gives_the_same_bits():
    first, second = (with_gradients(inputs(), CASES["everything"], "xla", jnp.float32) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def abstract_gradient(time, dtype=jnp.float32, **options):
    """The gradient in q, k, v, as a function to lower, and its abstract arguments: one head of width 8."""
    shape = jax.ShapeDtypeStruct((1, time, 1, 8), dtype)

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, implementation="xla", **options) ** 2)

    return jax.value_and_grad(loss, argnums=(0, 1, 2)), (shape,) * 3


def matmul_flops(jaxpr):
    """Multiply-adds times two of all matmuls, loops counted as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
            total += 2 * depth * np.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            total += times * matmul_flops(inner)
    return total


def flops(time, **options):
    function, arguments = abstract_gradient(time, **options)
    return matmul_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_blocks_that_see_nothing_are_not_computed(default_blocks):
    full = flops(4096, causal=False)
    assert full == 7 * 2 * 8 * 4096**2
    assert 0.5 * full < flops(4096) < 0.6 * full
    assert flops(256) < 0.65 * flops(256, causal=False)
    assert flops(8192, window=256) < 2.1 * flops(4096, window=256) < 0.4 * full
    assert flops(8192, window=256, kept=4) < 2.1 * flops(4096, window=256, kept=4)


@pytest.mark.parametrize("options", [{}, {"window": 256, "kept": 4}, {"causal": False}], ids=str)
def test_memory_grows_linearly(options, default_blocks):
    def temporary(time):
        function, arguments = abstract_gradient(time, **options)
        return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    long = temporary(8192)
    assert long < 5 * temporary(2048)
    assert long < 0.2 * 4 * 8192**2


def test_decoding_does_not_copy_the_cache():
    cache = jax.ShapeDtypeStruct((2, 2048, 4, 16), jnp.float32)
    step = jax.jit(lambda q, k, v: attention(q, k, v, implementation="xla"))
    compiled = step.lower(jax.ShapeDtypeStruct((2, 1, 8, 16), jnp.float32), cache, cache).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * 4 * cache.size


def test_cudnn_arguments_mean_the_same(monkeypatch):
    """The call made to JAX, run by JAX's own plain implementation."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **k: plain(*a, **k))
    monkeypatch.setattr(cudnn, "obstacles", lambda *_: [])
    q, k, v, _ = inputs(np.float32)
    v = np.concatenate([v, v[..., :2]], -1)
    for options in ({}, {"window": 5}, {"causal": False}, {"bias": BIAS[:1].astype(np.float32)}):
        got = attend(q, k, v, implementation="cudnn", **options)
        assert error(got, oracle(q, k, v, **options)) < 1e-5


def test_cudnn_refuses_and_says_who_can():
    q, k, v, _ = inputs(np.float32)
    with pytest.raises(ValueError, match=r"'cudnn' cannot honour .*float32.*sinks.*kept.*; can: xla, reference"):
        attention(q, k, v, sinks=SINKS, window=3, kept=1, implementation="cudnn")


def test_auto_logs_its_choice_once(caplog):
    dispatch._log_once.cache_clear()
    q, k, v, _ = inputs(np.float32)
    with caplog.at_level(logging.INFO, logger="kernels_pallas"):
        attention(q, k, v)
        attention(q, k, v)
    assert [record.message for record in caplog.records] == ["attention: implementation xla"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((2, 19, 3, 8))}, "3 heads, not a multiple of the 2"),
        ({"q": np.zeros((2, 19, 8))}, "q must be"),
        ({"k": np.zeros((2, 19, 2, 9))}, "k of shape"),
        ({"v": np.zeros((2, 18, 2, 6))}, "v of shape"),
        ({"sinks": np.zeros(2)}, "sinks must"),
        ({"bias": np.zeros((1, 2, 19, 19))}, "bias must"),
        ({"prefix_length": np.zeros((1,), np.int32)}, "prefix_length must"),
        ({"segment_ids": np.zeros((2, 18), np.int32)}, "segment_ids must"),
        ({"key_segment_ids": SEGMENTS}, "needs segment_ids"),
        ({"key_positions": SEGMENTS[:1]}, "key_positions must"),
        ({"window": 0}, "window must"),
        ({"kept": -1}, "kept must"),
        ({"implementation": "flash"}, "no implementation 'flash'; valid: auto, cudnn, xla, reference, tokamax, pallas"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = dict(zip("qkv", inputs(np.float32), strict=False)) | change
    with pytest.raises(ValueError, match=message):
        attention(**arguments)
