"""Decode attention, in plain JAX and by kernels in the interpreters, against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import target
from kernels_pallas.attention import attention
from kernels_pallas.decode_attention import decode_attention, mosaic_gpu, mosaic_tpu
from kernels_pallas.decode_attention.cache import Cache

SLOTS, HEADS = 200, 4
LENGTHS = [200, 0, 77]


def inputs(dtype=np.float32, time=1, groups=2, width=64, value_width=64, page=None, hidden=False, lengths=LENGTHS):
    """Rows of all lengths. Pages lie anywhere, and entries beyond a row's length are no pages."""
    generator = np.random.default_rng(0)
    rows = len(lengths)
    shape, more = (rows, SLOTS), {}
    if page is not None:
        count = -(-SLOTS // page)
        shape = rows * count + 2, page
        table = generator.permutation(shape[0])[: rows * count].reshape(rows, count)
        used = np.arange(count) * page < np.array(lengths)[:, None]
        more["page_table"] = jnp.asarray(np.where(used, table, 10**6), jnp.int32)
    if hidden:
        slots = SLOTS if page is None else count * page
        more["visible"] = jnp.asarray(generator.random((rows, slots)) < 0.6)
    sizes = {"q": (rows, time, HEADS, width), "k": (*shape, groups, width), "v": (*shape, groups, value_width)}
    floats = {name: jnp.asarray(generator.normal(size=size), dtype) for name, size in sizes.items()}
    return floats | {"lengths": jnp.asarray(lengths, jnp.int32)} | more


def wide(values):
    return {name: value.astype(jnp.float32) if name in "qkv" else value for name, value in values.items()}


def decode(values, implementation, **options):
    return jax.jit(lambda values: decode_attention(**values, **options, implementation=implementation))(values)


SINKS = np.array([0.5, -1.0, 2.0, 0.0], np.float32)
CASES = {
    "contiguous": ({}, {}),
    "few queries, window, sinks": ({"time": 3}, {"window": 40, "sinks": SINKS}),
    "pages, hidden": ({"page": 16, "hidden": True}, {"softcap": 2.0}),
    "large pages, few queries": ({"page": 128, "time": 2}, {"window": 100, "scale": 0.3}),
}
MORE = {
    "one group, wider values": ({"groups": 1, "value_width": 128}, {"sinks": SINKS}),
    "as many groups as heads": ({"groups": 4, "time": 3}, {"softcap": 5.0}),
    "pages of a tile": ({"page": 64, "groups": 1}, {}),
    "window, hidden": ({"hidden": True}, {"window": 9}),
    "wide heads": ({"width": 256, "value_width": 256, "page": 32, "time": 2}, {"window": 64}),
    "first token": ({"lengths": [1]}, {}),
    "more queries than tokens": ({"lengths": [2, 5], "time": 4, "page": 8}, {"sinks": SINKS}),
    "all in use": ({"lengths": [200, 199]}, {"window": 1}),
}


@pytest.mark.parametrize("case", {**CASES, **MORE})
def test_plain_jax_equals_the_definition(case, error):
    arguments, options = {**CASES, **MORE}[case]
    values = inputs(**arguments)
    assert error(decode(values, "xla", **options), decode(values, "reference", **options)) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_the_definition_is_attention_of_the_last_tokens(case, error):
    arguments, options = CASES[case]
    values = inputs(**arguments)
    y = decode(values, "reference", **options)
    cache = Cache(values["k"], values["v"], values["lengths"], values.get("page_table"), values.get("visible"))
    rows, time = cache.gathered(), values["q"].shape[1]
    for row, length in enumerate(LENGTHS):
        if length < time:
            assert np.all(np.asarray(y[row]) == 0)
            continue
        seen = slice(length) if cache.visible is None else np.flatnonzero(cache.visible[row, :length])
        k, v = rows.k[row : row + 1, seen], rows.v[row : row + 1, seen]
        alone = attention(values["q"][row : row + 1], k, v, **options, implementation="reference")
        assert error(y[row : row + 1], alone) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_tpu_kernel(case, error):
    arguments, options = CASES[case]
    for dtype, bound in ((np.float32, 1e-5), (jnp.bfloat16, 5e-3)):
        values = inputs(dtype, **arguments)
        with target.simulating("tpu"):
            got = decode(values, "pallas", **options)
        assert got.dtype == values["q"].dtype
        assert error(got, decode(wide(values), "reference", **options)) < bound


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
@pytest.mark.parametrize("parts", [1, 3])
def test_tpu_kernel_over_more_cases_and_parts(case, parts, error, monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "heuristic", lambda *_: {"slots": 128, "parts": parts})
    arguments, options = MORE[case]
    values = inputs(**arguments)
    with target.simulating("tpu"):
        got = decode(values, "pallas", **options)
    assert error(got, decode(values, "reference", **options)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("page", [None, 16])
def test_tpu_kernel_on_simulated_memories(page, error, capfd):
    """In the interpreter that starts with NaN everywhere, and looks for races and for what is out of bounds."""
    values = inputs(page=page, hidden=True, lengths=[130])
    cache = Cache(values["k"], values["v"], values["lengths"], values.get("page_table"), values["visible"])
    options = {"window": None, "softcap": None, "scale": 0.1, "blocks": {"slots": 64, "parts": 2}}
    exact = pltpu.InterpretParams(detect_races=True)
    got = mosaic_tpu.decode_attention(values["q"], cache, None, **options, simulated=exact)
    assert error(got, decode(values, "reference", scale=0.1)) < 1e-5
    assert "RACE" not in "".join(capfd.readouterr()).upper()


@pytest.mark.parametrize("case", CASES)
def test_gpu_kernel(case, error, without_races, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "heuristic", lambda *_: {"slots": 64, "stages": 2, "parts": 2})
    arguments, options = CASES[case]
    values = inputs(jnp.bfloat16, **{"groups": 1, "lengths": [200, 77], **arguments})
    with target.simulating("gpu"):
        got = decode(values, "pallas", **options)
    assert error(got, decode(wide(values), "reference", **options)) < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
@pytest.mark.parametrize("blocks", [{"slots": 64, "stages": 3, "parts": 1}, {"slots": 128, "stages": 2, "parts": 3}])
def test_gpu_kernel_over_more_cases_and_blocks(case, blocks, error, without_races, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "heuristic", lambda *_: blocks)
    arguments, options = MORE[case]
    values = inputs(jnp.bfloat16, **arguments)
    with target.simulating("gpu"):
        got, again = (decode(values, "pallas", **options) for _ in range(2))
    assert error(got, decode(wide(values), "reference", **options)) < 5e-3
    assert np.array_equal(got, again)


@pytest.mark.parametrize("page", [None, 32])
def test_gpu_kernel_lowers(page, lowered_for_hopper):
    def shapes(values):
        return jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), values)

    values = inputs(jnp.bfloat16, page=page, hidden=True, width=128, value_width=128, time=2)

    def call(values):
        return decode_attention(**values, window=100, softcap=3.0, implementation="pallas")

    assert "mosaic_gpu" in lowered_for_hopper(call, shapes(values))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_lengths_and_pages_are_data(platform):
    values = inputs(jnp.bfloat16, page=64, groups=1, lengths=[100])
    traced = []

    @jax.jit
    def run(values):
        traced.append(True)
        return decode_attention(**values, implementation="pallas")

    with target.simulating(platform):
        first = run(values)
        moved = values | {"lengths": jnp.asarray([101], jnp.int32), "page_table": values["page_table"][:, ::-1]}
        moved |= {"page_table": jnp.where(moved["page_table"] < 10, moved["page_table"], 0)}
        assert not np.array_equal(first, run(moved))
    assert len(traced) == 1


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_plain_jax_has_gradients_and_the_kernel_says_that_it_has_none(implementation):
    values = inputs(lengths=[9])

    def total(q, implementation):
        return jnp.sum(decode_attention(**(values | {"q": q}), implementation=implementation))

    assert np.any(np.asarray(jax.grad(total)(values["q"], implementation)) != 0)
    with target.simulating("tpu"), pytest.raises(ValueError, match="'pallas' has no gradient; can: xla, reference"):
        jax.grad(total)(values["q"], "pallas")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((3, 1, 3, 64))}, "3 heads, not a multiple of the 2"),
        ({"q": jnp.zeros((3, 4, 64))}, "q must be"),
        ({"k": jnp.zeros((3, SLOTS, 2, 32))}, "k must have shape"),
        ({"v": jnp.zeros((3, 5, 2, 64))}, "v must have shape"),
        ({"lengths": jnp.zeros((3,))}, "lengths must be integers"),
        ({"lengths": jnp.zeros((2,), jnp.int32)}, "lengths must have shape"),
        ({"visible": jnp.zeros((3, 5), bool)}, "visible must have shape"),
        ({"page_table": jnp.zeros((2, 5), jnp.int32)}, "page_table must have shape"),
        ({"sinks": jnp.zeros(2)}, "sinks must have shape"),
        ({"window": 0}, "window must be at least 1"),
        ({"implementation": "pallas"}, "'pallas' cannot honour backend cpu"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        decode_attention(**(inputs() | change))


def test_obstacles_are_named():
    with target.simulating("gpu"):
        with pytest.raises(ValueError, match="'pallas' cannot honour q of dtype float32; can: xla, reference"):
            decode_attention(**inputs(), implementation="pallas")
        with pytest.raises(ValueError, match="120 queries of a group, pages of 12 slots"):
            decode_attention(**inputs(jnp.bfloat16, time=60, page=12), implementation="pallas")
    with target.simulating("tpu"), pytest.raises(ValueError, match="head size 320"):
        decode_attention(**inputs(width=320), implementation="pallas")
