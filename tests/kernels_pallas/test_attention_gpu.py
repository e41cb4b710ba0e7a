"""The attention kernels for Hopper, in the interpreter and lowered, against the definition in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import attention
from kernels_pallas.attention.visibility import Visibility
from kernels_pallas.attention.visits import stretches, tiles
from kernels_pallas.target import simulating

pytestmark = pytest.mark.usefixtures("without_races")
BOUNDS = {"0": 5e-3, "1": 1e-5, "dq": 8e-3, "dk": 8e-3, "dv": 8e-3, "dsinks": 2e-2}
SINKS = np.array([0.3, -1.0], np.float32)


def documents(time, lengths, batch=1):
    """Ids of one row of documents, other rows shifted, the rest padding; "-" before a length is padding too."""
    ids = np.zeros((batch, time), np.int32)
    start = 0
    for number, length in enumerate(lengths, 1):
        ids[:, start : start + abs(length)] = number if length > 0 else 0
        start += abs(length)
    return np.stack([np.roll(row, 17 * i) for i, row in enumerate(ids)])


def inputs(time=75, keys=None, heads=2, groups=1, width=64, value_width=None, batch=1, dtype="bfloat16", size=1.0):
    """q, k, v in a narrow dtype."""
    generator = np.random.default_rng(time + width)
    keys, value_width = keys or time, value_width or width
    shapes = {"q": (time, heads, width), "k": (keys, groups, width), "v": (keys, groups, value_width)}
    return {name: jnp.asarray(size * generator.normal(size=(batch, *shape)), dtype) for name, shape in shapes.items()}


def attend(implementation, **options):
    """y and logsumexps, zero where a query sees nothing, as a function of the arrays that have gradients."""

    def run(**arrays):
        wide = implementation == "reference"
        arrays = {name: x.astype("float32") if wide else x for name, x in arrays.items()}
        y, lse = attention(**arrays, **options, return_lse=True, implementation=implementation)
        return y, jnp.where(lse == -1e20, 0, lse)

    return run


def simulated(results, values, options):
    with simulating("gpu"):
        return results(attend("pallas", **options), values)


def check(results, error, values, options):
    """Outputs and gradients of the kernel against the definition; those of the kernel."""
    wanted = results(attend("reference", **options), values)
    got = simulated(results, values, options)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert error(got[name], value) < BOUNDS[name], name
    return got


EVERYTHING = {
    "window": 20,
    "softcap": 2.0,
    "prefix_length": np.array([90], np.int32),
    "segment_ids": documents(140, [30, -5, 60, 1, 40]),
}


def test_window_sinks_softcap_segments_and_prefix_together(results, error):
    values = inputs(140, value_width=128) | {"sinks": jnp.asarray(SINKS)}
    got = check(results, error, values, EVERYTHING)
    padding = EVERYTHING["segment_ids"][0] == 0
    assert padding.sum() == 9
    assert np.all(got["0"][0, padding] == 0)
    assert np.all(got["dq"][0, padding] == 0)
    assert np.all(got["dk"][0, padding] == 0)


CASES = {
    "one token": ({"time": 1}, {}),
    "causal": ({"time": 129, "groups": 2}, {}),
    "a whole tile": ({"time": 128, "heads": 4, "groups": 2}, {}),
    "full": ({"time": 75, "batch": 2}, {"causal": False}),
    "window": ({"time": 300}, {"window": 40}),
    "window of one": ({"time": 65}, {"window": 1}),
    "window both sides": ({"time": 200}, {"window": 30, "causal": False}),
    "window kept": ({"time": 300}, {"window": 30, "kept": 3}),
    "float16 softcap": ({"dtype": "float16"}, {"softcap": 5.0}),
    "segments": ({"time": 300, "batch": 2}, {"segment_ids": documents(300, [-9, 130, 1, 100, -20, 30], 2)}),
    "segments kept": ({"time": 300}, {"segment_ids": documents(300, [140, 20, -8, 100]), "window": 10, "kept": 4}),
    "segments full": ({"time": 150}, {"segment_ids": documents(150, [70, 80]), "causal": False}),
    "only padding": ({"time": 70}, {"segment_ids": np.zeros((1, 70), np.int32)}),
    "prefix": ({"time": 140, "batch": 2}, {"prefix_length": np.array([0, 77], np.int32)}),
    "prefix window": ({"time": 260}, {"prefix_length": np.array([20], np.int32), "window": 9}),
    "last queries": ({"time": 70, "keys": 150}, {"window": 100}),
    "last queries full": ({"time": 20, "keys": 150}, {"causal": False}),
    "more queries than keys": ({"time": 90, "keys": 30}, {}),
    "four heads per group": ({"heads": 8, "groups": 2}, {}),
    "odd widths": ({"width": 80, "value_width": 40}, {"scale": 0.3}),
    "negative scale": ({}, {"scale": -0.2, "window": 30}),
    "no scale": ({}, {"scale": 0.0}),
    "width 128": ({"width": 128, "time": 140}, {}),
    "latent widths": ({"width": 192, "value_width": 128}, {"softcap": 20.0}),
    "width 256": ({"width": 256, "time": 140}, {"segment_ids": documents(140, [100, 40])}),
    "wider values": ({"width": 64, "value_width": 256}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(results, error, case):
    shape, options = CASES[case]
    got = check(results, error, inputs(**shape), options)
    assert all(np.all(np.isfinite(value)) for value in got.values())


@pytest.mark.slow
def test_sinks_where_nothing_is_seen(results, error):
    values = inputs(70) | {"sinks": jnp.asarray(SINKS)}
    got = check(results, error, values, {"segment_ids": documents(70, [-30, 20, -20])})
    assert np.allclose(got["1"][0, :30], SINKS, rtol=1e-6)


@pytest.mark.slow
def test_huge_logits(results, error):
    values = inputs(100, size=10.0)
    wanted, got = (results(f, values) for f in (attend("reference"), lambda **x: simulated_output(**x)))
    assert np.abs(wanted["1"]).max() > 100
    assert all(np.all(np.isfinite(value)) for value in got.values())
    assert error(got["0"], wanted["0"]) < 5e-3


def simulated_output(**values):
    with simulating("gpu"):
        return attend("pallas")(**values)


@pytest.mark.slow
def test_the_same_call_gives_the_same_bits(results):
    values = inputs(140, heads=4, groups=2) | {"sinks": jnp.asarray(np.tile(SINKS, 2))}
    options = EVERYTHING | {"softcap": None}
    first, second = (simulated(results, values, options) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


MASKS = [
    {"causal": False},
    {"window": 9},
    {"window": 9, "causal": False},
    {"window": 9, "kept": 3},
    {"prefix": 12},
    {"segments": True},
    {"segments": True, "prefix": 30, "window": 5},
]


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize(("time", "keys"), [(75, 75), (20, 75), (40, 16)])
def test_stretches_hold_what_is_seen_and_whole(options, time, keys):
    """Of tiles of 8 queries by 16 keys, against the mask itself."""
    options = dict(options)
    ids = documents(max(time, keys), [-3, 20, 16, 1, 30]) if options.pop("segments", False) else None
    prefix = options.pop("prefix", None)
    seen = Visibility(
        query_positions=jnp.arange(keys - time, keys)[None],
        key_positions=jnp.arange(keys)[None],
        key_ranks=jnp.arange(keys)[None],
        prefix_length=None if prefix is None else jnp.array([prefix]),
        segment_ids=None if ids is None else jnp.asarray(ids[:, -time:]),
        key_segment_ids=None if ids is None else jnp.asarray(ids[:, -keys:]),
        in_order=True,
        **{"causal": True, "window": None, "kept": 0} | options,
    )
    mask = seen.mask()
    mask = np.ones((1, time, keys), bool) if mask is None else np.asarray(mask)
    filled = np.pad(mask, [(0, 0), (0, -time % 8), (0, -keys % 16)])
    blocks = filled.reshape(1, filled.shape[1] // 8, 8, filled.shape[2] // 16, 16)
    some, whole = (np.asarray(x) for x in tiles(seen, time, keys, (8, 16)))
    assert np.all(some >= blocks.any(axis=(2, 4)))
    if ids is None:
        assert np.array_equal(some, blocks.any(axis=(2, 4)))
    inside = np.pad(mask, [(0, 0), (0, -time % 8), (0, -keys % 16)], constant_values=True).reshape(blocks.shape)
    really = inside.all(axis=(2, 4))
    really[:, :, keys // 16 :] = False
    assert np.all(whole <= really)
    rows = np.asarray(stretches(jnp.asarray(some), jnp.asarray(whole)))[0]
    for row, (first, count, following, more, full, end) in enumerate(rows):
        visited = {*range(first, first + count), *range(following, following + more)}
        assert visited >= set(np.flatnonzero(some[0, row]))
        assert np.all(whole[0, row, full:end])
        assert len(visited) == count + more


def test_windows_visit_few_tiles():
    visibility = Visibility(jnp.arange(16384)[None], jnp.arange(16384)[None], jnp.arange(16384)[None], None, None, None,
                            causal=True, window=1024, kept=0, in_order=True)  # fmt: skip
    rows = np.asarray(stretches(*tiles(visibility, 16384, 16384, (128, 128))))[0]
    assert rows[:, [1, 3]].sum(axis=1).max() == 9


def abstract(batch=2, time=2048, heads=8, groups=2, width=128, value_width=None):
    shapes = (time, heads, width), (time, groups, width), (time, groups, value_width or width)
    return [jax.ShapeDtypeStruct((batch, *shape), jnp.bfloat16) for shape in shapes]


def loss(q, k, v, **options):
    return jnp.sum(attention(q, k, v, **options, implementation="pallas").astype(jnp.float32) ** 2)


@pytest.mark.parametrize(
    "width", [128, pytest.param(64, marks=pytest.mark.slow), pytest.param(256, marks=pytest.mark.slow)]
)
def test_gradients_lower_for_hopper_and_are_our_kernels(lowered_for_hopper, width):
    gradient = jax.grad(functools.partial(loss, window=512, softcap=30.0), (0, 1, 2))
    program = lowered_for_hopper(gradient, *abstract(width=width))
    kernels = ["dk_dv"] if width <= 128 else ["dk", "dv"]
    for name in ("attention_forward", "attention_backward_queries", *(f"attention_backward_{x}" for x in kernels)):
        assert name in program


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"dtype": "float32"}, {}, "q of dtype float32, k of dtype float32, v of dtype float32"),
        ({"width": 320}, {}, "head size 320, 320"),
        ({}, {"bias": np.zeros((1, 1, 75, 75))}, "bias"),
        ({}, {"query_positions": np.zeros((1, 75), np.int32)}, "query_positions or key_positions"),
    ],
)
def test_what_it_cannot_do_is_said(change, options, message):
    with simulating("gpu"), pytest.raises(ValueError, match=f"'pallas' cannot honour {message}; can: .*reference"):
        attention(**inputs(**change), **options, implementation="pallas")


def test_a_machine_without_kernels_says_who_has_them():
    with pytest.raises(ValueError, match=r"backend cpu \(Pallas kernels run on TPUs and on NVIDIA Hopper GPUs\); can"):
        attention(**inputs(), implementation="pallas")
