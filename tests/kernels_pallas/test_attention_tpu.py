"""The fused TPU kernels of attention in the interpreter, against the definition; and the tiles that they visit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import target
from kernels_pallas.attention import _visibility, attention, mosaic_tpu, visits
from kernels_pallas.attention.visits import IDLE, PARTLY, WHOLLY

BATCH, TIME = 2, 300
GENERATOR = np.random.default_rng(0)
SEGMENTS = np.sort(GENERATOR.integers(1, 5, (BATCH, TIME)), axis=1).astype(np.int32)
SEGMENTS[0, :9], SEGMENTS[0, -140:], SEGMENTS[1, 100:120] = 0, 0, 0
SHUFFLED = np.stack([GENERATOR.permutation(TIME) for _ in range(BATCH)]).astype(np.int32)
PREFIX = np.array([0, 200], np.int32)
SINKS = np.array([0.5, -1.0, 2.0, 0.0], np.float32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Three blocks of 128 tokens, the last one not full."""
    monkeypatch.setattr(mosaic_tpu, "heuristic", lambda *_: {"query": 128, "key": 128})


def inputs(dtype=np.float32, time=TIME, keys=TIME, heads=4, groups=2, width=64, value_width=64, batch=BATCH):
    generator = np.random.default_rng(1)
    shapes = {"q": (time, heads, width), "k": (keys, groups, width), "v": (keys, groups, value_width)}
    return {name: jnp.asarray(generator.normal(size=(batch, *shape)), dtype) for name, shape in shapes.items()}


def both(results, values, options, sinks=None):
    """Outputs, logsumexps and gradients by the kernels and, of the same values in float32, by the definition."""
    wide = {name: value.astype(jnp.float32) for name, value in values.items()}
    learned = {} if sinks is None else {"sinks": jnp.asarray(sinks)}

    def run(implementation):
        def call(**values):
            return attention(**values, **options, implementation=implementation, return_lse=True)

        return call

    with target.simulating("tpu"):
        got = results(run("pallas"), values | learned)
    return got, results(run("reference"), wide | learned)


def seen(logsumexp):
    return np.where(logsumexp < -1e19, -1.0, logsumexp)


def check(got, wanted, error, dtype=np.float32):
    output, gradient, other = (1e-5, 1e-4, 1e-4) if dtype == np.float32 else (5e-3, 8e-3, 2e-2)
    assert error(got["0"], wanted["0"]) < output
    assert np.array_equal(got["1"] < -1e19, wanted["1"] < -1e19)
    assert error(seen(got["1"]), seen(wanted["1"])) < output
    assert all(error(got[f"d{name}"], wanted[f"d{name}"]) < gradient for name in "qkv")
    assert "dsinks" not in got or error(got["dsinks"], wanted["dsinks"]) < other


CASES = {
    "causal": {},
    "packed, window, kept": {"segment_ids": SEGMENTS, "window": 70, "kept": 3},
}

MORE = {
    "full": {"causal": False},
    "window, capped": {"window": 70, "softcap": 2.0},
    "full, packed, prefix": {"segment_ids": SEGMENTS, "prefix_length": PREFIX, "causal": False, "scale": 0.3},
    "full, window": {"causal": False, "window": 40},
    "window, kept": {"window": 40, "kept": 5},
    "packed": {"segment_ids": SEGMENTS},
    "prefix, window": {"prefix_length": PREFIX, "window": 9},
    "packed, prefix, capped": {"segment_ids": SEGMENTS, "prefix_length": PREFIX, "softcap": 5.0},
    "positions": {"query_positions": SHUFFLED, "key_positions": SHUFFLED[:, ::-1]},
    "positions, window, kept": {"query_positions": SHUFFLED, "key_positions": SHUFFLED[::-1], "window": 6, "kept": 2},
    "everything": {**CASES["packed, window, kept"], "prefix_length": PREFIX, "softcap": 2.0, "scale": 0.5,
                   "query_positions": SHUFFLED, "key_positions": SHUFFLED},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_definition(case, results, error):
    sinks = SINKS if "packed" in case else None
    check(*both(results, inputs(value_width=32), CASES[case], sinks), error)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_every_mask_in_both_dtypes(case, dtype, results, error):
    check(*both(results, inputs(dtype), MORE[case], SINKS), error, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_bfloat16(case, results, error):
    check(*both(results, inputs(jnp.bfloat16), CASES[case], SINKS), error, jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [
    {"time": 1}, {"time": 130}, {"keys": 40}, {"time": 1, "keys": 1}, {"time": 128, "keys": 256},
    {"time": 15, "keys": 15, "width": 60, "value_width": 100, "batch": 1}, {"heads": 3, "groups": 3, "width": 128},
    {"heads": 6, "groups": 1, "width": 256, "value_width": 128}, {"heads": 1, "groups": 1, "value_width": 256},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"window": 20, "kept": 3}, {"causal": False}], ids=str)
def test_shapes(shape, options, results, error):
    check(*both(results, inputs(**shape), options), error)


def test_large_logits(results, error):
    values = inputs(time=150, keys=150)
    values = values | {"q": 40 * values["q"], "k": 40 * values["k"]}
    got, wanted = both(results, values, {}, SINKS)
    assert error(got["0"], wanted["0"]) < 1e-4  # logits of 1e4 in float32 are good to 1e-3, whatever order sums are in
    assert all(np.all(np.isfinite(value)) for value in got.values())


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["without sinks", "sinks"])
def test_rows_that_see_nothing_are_zero_and_so_are_their_gradients(sinks, results):
    got, wanted = both(results, inputs(time=150, keys=150), {"segment_ids": np.zeros((BATCH, 150), np.int32)}, sinks)
    assert all(np.all(got[name] == 0) for name in ("0", "dq", "dk", "dv"))
    assert np.allclose(got["1"], wanted["1"], rtol=1e-6)


def test_twice_the_same_bits_and_the_future_changes_nothing_before():
    values = inputs()

    def run(values):
        with target.simulating("tpu"):
            return np.asarray(attention(**values, window=200, implementation="pallas"))

    first, again = run(values), run(values)
    later = run(values | {name: values[name].at[:, 140:].set(50.0) for name in "kv"})
    assert np.array_equal(first, again)
    assert np.array_equal(first[:, :140], later[:, :140])
    assert not np.allclose(first[:, 140:], later[:, 140:])


@pytest.mark.slow
def test_the_chips_memories_are_used_as_they_should(error, capfd):
    """In the interpreter that starts with NaN everywhere, and looks for races and for what is out of bounds."""
    values = inputs(time=140, keys=140, heads=2, groups=1, batch=1)
    rule = _visibility(values["q"], values["k"], True, 70, 3, None, SEGMENTS[:1, :140], None, None, None)

    def gradients(simulated):
        def total(q, k, v, sinks):
            options = {"scale": 0.1, "softcap": None, "blocks": {"query": 128, "key": 128}, "simulated": simulated}
            y, lse = mosaic_tpu.attention(q, k, v, sinks, None, rule, **options)
            return jnp.sum(y**2) + jnp.sum(jnp.where(lse < -1e19, 0, lse))

        return jax.grad(total, argnums=(0, 1, 2, 3))(*values.values(), jnp.asarray(SINKS[:2]))

    exact = gradients(pltpu.InterpretParams(detect_races=True))
    assert all(error(got, wanted) < 1e-6 for got, wanted in zip(exact, gradients(True), strict=True))
    assert "RACE" not in "".join(capfd.readouterr()).upper()


def test_the_gradient_is_made_by_kernels():
    def total(q, k, v):
        return jnp.sum(attention(q, k, v, implementation="pallas"))

    with target.simulating("tpu"):
        program = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(*inputs().values()))
    assert all(f"name=attention_{part}" in program for part in ("forward", "query_gradient", "key_gradient"))


def test_obstacles_are_named():
    bias = jnp.zeros((1, 1, TIME, TIME))
    with target.simulating("tpu"):
        with pytest.raises(ValueError, match="'pallas' cannot honour bias; can: xla, reference"):
            attention(**inputs(), bias=bias, implementation="pallas")
        with pytest.raises(ValueError, match="head size 320"):
            attention(**inputs(width=320), implementation="pallas")
        with pytest.raises(ValueError, match="q of dtype float16"):
            attention(**inputs(jnp.float16), implementation="pallas")


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("case", {**CASES, **MORE})
def test_visits_leave_out_only_tiles_in_which_nothing_is_seen(case, by_key):
    options = {name: value for name, value in {**CASES, **MORE}[case].items() if name not in ("softcap", "scale")}
    defaults = dict.fromkeys(("prefix_length", "segment_ids", "key_segment_ids", "query_positions", "key_positions"))
    arguments = {"causal": True, "window": None, "kept": 0, **defaults, **options}
    if arguments["segment_ids"] is not None:
        arguments["key_segment_ids"] = arguments["segment_ids"]
    values = inputs()
    rule = _visibility(values["q"], values["k"], **arguments)
    mask = rule.mask()
    mask = np.ones((1, TIME, TIME), bool) if mask is None else np.asarray(mask)
    query, key, kind = (np.asarray(table) for table in visits.visits(rule, TIME, TIME, (64, 32), by_key=by_key))
    padded = np.pad(mask, [(0, 0), (0, 20), (0, 20)]).reshape(len(mask), 5, 64, 10, 32)
    full = np.pad(mask, [(0, 0), (0, 20), (0, 20)], mode="edge")
    full[:, :, TIME:] = False
    full = full.reshape(len(mask), 5, 64, 10, 32).all(axis=(2, 4))
    for row in range(len(mask)):
        at = min(row, len(query) - 1)
        kinds = np.full((5, 10), IDLE)
        live = kind[at] != IDLE
        assert len(set(zip(query[at][live], key[at][live], strict=True))) == live.sum()
        kinds[query[at][live], key[at][live]] = kind[at][live]
        own = key[at] if by_key else query[at]
        assert list(dict.fromkeys(own)) == sorted(set(own)) == list(range(10 if by_key else 5))
        assert np.all(np.diff(own) >= 0)
        assert np.all(kinds[padded[row].any(axis=(1, 3))] >= PARTLY)
        assert np.all(full[row][kinds == WHOLLY])


def test_windows_and_documents_skip_tiles():
    def live(time, **options):
        values = inputs(time=time, keys=time, batch=1)
        given = {"window": None, "segment_ids": None, **options}
        rule = _visibility(values["q"], values["k"], True, given["window"], 0, None, given["segment_ids"],
                           given["segment_ids"], None, None)  # fmt: skip
        listed = visits.visits(rule, time, time, (128, 128))
        return listed.query.shape[1], int(jnp.sum(listed.kind != IDLE))

    assert live(1024) == (36, 36)  # 8 * 9 / 2
    assert live(1024, window=128) == (15, 15)
    documents = np.repeat(np.arange(1, 5, dtype=np.int32), 256)[None]
    assert live(1024, segment_ids=documents) == (36, 12)
