"""Linear attention on Hopper GPUs, in the interpreter: against its definition token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import target
from kernels_pallas.chunk_states import advance_gpu
from kernels_pallas.linear_attention import linear_attention, mosaic_gpu

BOUNDS = {"0": 5e-3, "1": 5e-3, "dlog_decay": 2e-2}  # of bfloat16 inputs; the other gradients 8e-3

# Padding in front, in a document, between two and at the end; a document of one token, one over a chunk's border.
PACKED = [0] * 5 + [3] * 20 + [0] * 3 + [3] * 12 + [1] + [2] * 30 + [0] * 2 + [7] * 52 + [0] * 5


def arguments(time, heads, groups, keys, values, decay, *, least=0.05, most=2.0):
    """Arrays of one row with an initial state; decays from exp(-most) to exp(-least) per token."""
    generator = np.random.default_rng(0)
    shapes = {"head": (1, time, heads), "channel": (1, time, heads, keys), "constant": (heads,)}
    given = {
        "q": generator.normal(size=(1, time, groups, keys)),
        "k": generator.normal(size=(1, time, groups, keys)) / 4,
        "v": generator.normal(size=(1, time, heads, values)),
    }
    given = {name: jnp.asarray(value, jnp.bfloat16) for name, value in given.items()}
    if decay != "none":
        steps = -np.exp(generator.uniform(np.log(least), np.log(most), size=shapes[decay]))
        given["log_decay"] = jnp.asarray(steps, jnp.float32)
    given["initial_state"] = jnp.asarray(generator.normal(size=(1, heads, keys, values)), jnp.float32)
    return given


def errors(results, error, given, **options):
    """Name → error of the kernel's outputs and gradients."""
    with target.simulating("gpu"):
        got = results(functools.partial(linear_attention, implementation="pallas", **options), given)
    wanted = results(functools.partial(linear_attention, implementation="reference", **options), given)
    return {name: error(got[name], wanted[name]) for name in wanted}


def within_bounds(found):
    return all(value < BOUNDS.get(name, 8e-3) for name, value in found.items())


@pytest.mark.quick_for("channel")
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_packed_rows_of_odd_lengths_and_widths(results, error, without_races, decay):
    given = arguments(len(PACKED), 3, 1 if decay == "head" else 3, 40, 70, decay)
    found = errors(results, error, given, segment_ids=jnp.asarray([PACKED]))
    assert within_bounds(found), found


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_decays_that_forget_all_beside_some_that_forget_nothing(results, error, without_races, decay):
    given = arguments(70, 2, 2, 64, 64, decay, least=1e-4, most=30)
    found = errors(results, error, given)
    assert within_bounds(found), found


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_decays_that_all_forget(results, error, without_races, decay):
    given = arguments(70, 2, 2, 64, 64, decay, least=10, most=300)
    found = errors(results, error, given)
    # Nothing comes over to the next token: the gradient of the decays is that of the tokens themselves, nothing.
    assert within_bounds(found), found


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2, 64, 200])
@pytest.mark.parametrize("decay", ["none", "constant", "head", "channel"])
def test_lengths_and_wide_states(results, error, without_races, time, decay):
    given = arguments(time, 4, 2, 128, 256, decay)
    found = errors(results, error, given)
    assert within_bounds(found), found


@pytest.mark.slow
@pytest.mark.parametrize("decay", [pytest.param("none", marks=pytest.mark.slow), "head"])
def test_heads_of_a_group_are_added_up_in_a_block(results, error, without_races, monkeypatch, decay):
    given = arguments(70, 4, 2, 64, 64, decay)
    monkeypatch.setattr(mosaic_gpu, "heuristic", lambda *inputs: {"chunk": 64, "heads": 2})
    found = errors(results, error, given)
    assert within_bounds(found), found


@pytest.mark.slow
def test_the_same_bits_twice(results):
    given = arguments(100, 2, 1, 64, 64, "head")
    with target.simulating("gpu"):
        first, second = (results(functools.partial(linear_attention, implementation="pallas"), given) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def shapes(batch, time, heads, groups, keys, values, decay):
    given = [(batch, time, groups, keys)] * 2 + [(batch, time, heads, values)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in given]
    decays = {"head": (batch, time, heads), "channel": (batch, time, heads, keys)}
    return arrays + ([jax.ShapeDtypeStruct(decays[decay], jnp.float32)] if decay in decays else [])


@pytest.mark.parametrize("decay", [pytest.param("none", marks=pytest.mark.slow), "head", "channel"])
def test_lowers_for_hopper_with_kernels_in_the_gradient(lowered_for_hopper, decay):
    inputs = shapes(8, 2048, 8, 8, 128, 256, decay)

    def loss(*inputs):
        y, state = linear_attention(*inputs, implementation="pallas")
        return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(state)

    gradient = jax.grad(loss, argnums=tuple(range(len(inputs))))
    program = lowered_for_hopper(gradient, *inputs)
    # Forward: states and what reads them. Backward: gradients of states, and of three inputs that read them. Per
    # channel also products within chunks and their gradients.
    assert program.count("custom_call @mosaic_gpu") == (8 if decay == "channel" else 6)
    with target.simulating("gpu"):
        names = str(jax.make_jaxpr(gradient)(*inputs))
    assert "chunk_states_advance_back" in names
    assert "chunk_states_read" + "_decayed" * (decay != "channel") + "_turned_back" * (decay != "channel") in names


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["head", pytest.param("channel", marks=pytest.mark.slow)])
def test_a_length_in_spans(results, error, without_races, monkeypatch, decay):
    given = arguments(250, 1, 1, 64, 64, decay)
    monkeypatch.setattr(advance_gpu, "spans", lambda blocks, chunks: chunks // 2)
    found = errors(results, error, given, segment_ids=jnp.asarray([[1] * 30 + [2] * 120 + [3] * 100]))
    assert within_bounds(found), found


def test_one_row_of_few_heads_is_cut_into_spans(lowered_for_hopper):
    inputs = shapes(1, 16384, 24, 1, 128, 64, "head")
    program = lowered_for_hopper(functools.partial(linear_attention, implementation="pallas"), *inputs)
    # Of every span what it adds to a state, then the states, then what reads them.
    assert program.count("custom_call @mosaic_gpu") == 3


def test_as_many_heads_are_added_up_as_leave_the_chip_full():
    few, many = (shapes(batch, 2048, 24, 1, 128, 64, "head") for batch in (1, 8))
    assert mosaic_gpu.heuristic(*few) == {"chunk": 64, "heads": 2}
    assert mosaic_gpu.heuristic(*many) == {"chunk": 64, "heads": 12}


def test_what_it_cannot_honour_is_refused_in_one_line():
    given = arguments(70, 2, 2, 64, 64, "head")
    given["q"] = given["q"].astype(jnp.float32)
    with target.simulating("gpu"), pytest.raises(ValueError, match=r"pallas.*q of dtype float32.*can: xla, reference"):
        linear_attention(**given, implementation="pallas")
