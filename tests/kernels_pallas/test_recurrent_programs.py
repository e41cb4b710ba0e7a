"""What recurrent operators keep, refuse and survive: residuals, memory, layers, shapes, hard numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.delta_rule import delta_rule, substitution
from kernels_pallas.linear_attention import linear_attention
from kernels_pallas.linear_recurrence import linear_recurrence
from kernels_pallas.segments import documents
from kernels_pallas.selective_scan import selective_scan
from kernels_pallas.short_convolution import short_convolution

BATCH, TIME = 2, 64
QUICK = {"xla_backend_optimization_level": 0}


def shapes(time=TIME, width=8, states=16):
    """Arguments of every operator, and the number of values in its state of one row."""
    channels, heads = (BATCH, time, width), (BATCH, time, 2, states)
    matrices = 4 * states * width
    return {
        selective_scan: (
            [channels, channels, (width, states), (BATCH, time, states), (BATCH, time, states)],
            width * states,
        ),
        linear_attention: ([heads, heads, (BATCH, time, 4, width), (BATCH, time, 4)], matrices),
        delta_rule: ([heads, heads, (BATCH, time, 4, width), (BATCH, time, 4), (BATCH, time, 4)], matrices),
        linear_recurrence: ([channels, channels], width),
        short_convolution: ([channels, (4, width)], 0),
    }


def arguments(operator, time=TIME, seed=0):
    """Values that suit every argument: log-decays and A negative, steps and beta within (0, 1), keys of length 1."""
    generator, values = np.random.default_rng(seed), []
    for position, shape in enumerate(shapes(time)[operator][0]):
        value = generator.normal(size=shape)
        if position == {selective_scan: 1, delta_rule: 3}.get(operator):
            value = 1 / (1 + np.exp(-value))
        if (operator, position) in [
            (selective_scan, 2),
            (linear_attention, 3),
            (delta_rule, 4),
            (linear_recurrence, 0),
        ]:
            value = -np.abs(value)
        if operator is delta_rule and position == 1:
            value /= np.linalg.norm(value, axis=-1, keepdims=True)
        values.append(jnp.asarray(value, jnp.float32))
    return values


def error(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    return np.sqrt(np.mean((got - wanted) ** 2)) / max(np.sqrt(np.mean(wanted**2)), 1e-6)


every_operator = pytest.mark.parametrize("operator", shapes(), ids=lambda operator: operator.__name__)


@every_operator
@pytest.mark.parametrize("packed", [False, True])
def test_only_inputs_and_chunk_states_are_kept(operator, packed):
    given, per_state = shapes()[operator]
    ids = jnp.ones((BATCH, TIME), jnp.int32) if packed else None

    def pullback(*values):
        return jax.vjp(lambda *v: operator(*v, segment_ids=ids, chunk_size=16, implementation="xla"), *values)[1]

    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in given]
    kept = jax.tree.leaves(jax.eval_shape(pullback, *arrays))
    initial = BATCH * 3 * 8 if operator is short_convolution else 0
    states = BATCH * TIME // 16 * per_state
    rows = 2 * BATCH * TIME if packed else 0
    assert sum(x.size for x in kept) == sum(np.prod(shape) for shape in given) + states + rows + initial


def temporary(operator, implementation, time):
    """Bytes of temporary memory of loss and gradients."""
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes(time)[operator][0]]

    def loss(values):
        y, state = operator(*values, chunk_size=32, implementation=implementation)
        return jnp.sum(y**2) + jnp.sum(state)

    compiled = jax.jit(jax.grad(loss), compiler_options=QUICK).lower(given).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("operator", [selective_scan, linear_attention], ids=lambda operator: operator.__name__)
def test_memory_is_linear_and_far_below_that_of_tokens(operator):
    short, long = (temporary(operator, "xla", time) for time in (1024, 4096))
    assert long < 4.5 * short
    assert temporary(operator, "reference", 1024) > 4 * short


@every_operator
def test_in_rematerialised_layers_under_scan_vmap_and_donation(operator):
    """The gradient through two scanned, rematerialised layers is that of the same layers written out, by tokens."""
    values = arguments(operator)
    main = {linear_attention: 2, delta_rule: 2, linear_recurrence: 1}.get(operator, 0)
    ids = jnp.asarray(np.repeat([[1, 2, 0], [3, 3, 4]], [20, 30, 14], axis=1))

    def layer(x, scale, implementation):
        given = [*values[:main], scale * x, *values[main + 1 :]]
        return x + operator(*given, segment_ids=ids, implementation=implementation)[0]

    def scanned(x, scales):
        step = jax.checkpoint(lambda x, scale: (layer(x, scale, "auto"), None))
        return jnp.sum(jax.lax.scan(step, x, scales)[0] ** 2)

    def written_out(x, scales):
        for scale in scales:
            x = layer(x, scale, "reference")
        return jnp.sum(x**2)

    x, scales = jnp.stack([values[main], 0.5 * values[main]]), jnp.asarray([0.3, 0.7])
    wanted = [jax.jit(jax.grad(written_out, argnums=(0, 1)), compiler_options=QUICK)(row, scales) for row in x]
    gradient = jax.vmap(jax.grad(scanned, argnums=(0, 1)), in_axes=(0, None))
    dx, dscales = jax.jit(gradient, donate_argnums=0, compiler_options=QUICK)(x, scales)
    for row in range(2):
        assert error(dx[row], wanted[row][0]) < 1e-4
        assert error(dscales[row], wanted[row][1]) < 1e-4


@every_operator
def test_a_single_token_continues_a_sequence(operator):
    values = arguments(operator)
    timed = [value.shape[:2] == (BATCH, TIME) for value in values]
    y, state = operator(*values)
    short = [x[:, :-1] if is_timed else x for x, is_timed in zip(values, timed, strict=True)]
    last = [x[:, -1:] if is_timed else x for x, is_timed in zip(values, timed, strict=True)]
    token, after = operator(*last, initial_state=operator(*short)[1])
    assert error(token, y[:, -1:]) < 1e-5
    assert error(after, state) < 1e-5


def test_a_constant_decay_per_head_is_that_decay_at_every_token():
    q, k, v, decay = arguments(linear_attention)
    decay = decay[0, 0]

    def loss(decay, q):
        y, state = linear_attention(q, k, v, decay)
        return jnp.sum(y**2) + jnp.sum(state)

    wanted = jax.grad(loss)(jnp.broadcast_to(decay, (BATCH, TIME, 4)), q)
    assert error(jax.grad(loss)(decay, q), jnp.sum(wanted, axis=(0, 1))) < 1e-5


def test_a_decay_that_cannot_be_seen_is_bounded():
    log_a, x = arguments(linear_recurrence)
    traced = jax.jit(linear_recurrence)
    assert error(traced(-log_a, x)[0], linear_recurrence(0 * log_a, x)[0]) == 0
    forgetting = jnp.where(jnp.arange(TIME)[:, None] == 9, -jnp.inf, log_a)
    y, _ = linear_recurrence(forgetting, x)
    assert error(y[:, 9], x[:, 9]) == 0
    assert np.all(np.isfinite(jax.grad(lambda log_a: jnp.sum(traced(log_a, x)[0]))(forgetting)))


def test_mild_decays_beside_violent_ones_stay_exact():
    """Float32 cumulative sums of a chunk would have lost the small ones."""
    q, k, v, decay = arguments(linear_attention)
    decay = jnp.where(jnp.arange(TIME)[:, None] < 50, -100.3, 1e-3 * decay)
    y, _ = linear_attention(q, k, v, decay, chunk_size=TIME, implementation="xla")
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(value), jnp.float64) for value in (q, k, v, decay)]
        wanted, _ = linear_attention(*exact, implementation="reference")
    assert error(y[:, 50:], np.asarray(wanted)[:, 50:]) < 1e-6


@pytest.mark.parametrize("alike", [0.0, 0.9, 0.99, 1.0])
def test_substitution_survives_nearly_parallel_keys(alike):
    """Error of the solution, in float32, of the hardest systems of beta = 2."""
    generator, chunk = np.random.default_rng(0), 64
    keys = np.sqrt(alike) * generator.normal(size=64) / 8 + np.sqrt(1 - alike) * generator.normal(size=(chunk, 64)) / 8
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    system = np.tril(2 * keys @ keys.T, -1).astype(np.float32)
    right = generator.normal(size=(chunk, 8)).astype(np.float32)
    wanted = np.linalg.solve(np.eye(chunk) + np.asarray(system, np.float64), right)
    assert error(substitution.solve(system, right), wanted) < 1e-5


def test_documents_are_numbered_by_changes_of_live_ids():
    ids = jnp.asarray([[0, 5, 0, 5, 2, 0, 2, 9], [0, 0, 0, 0, 0, 0, 0, 0], [7, 7, 7, 1, 1, 1, 0, 0]])
    document, live = documents(ids)
    assert document.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2], [0] * 8, [0, 0, 0, 1, 1, 1, 1, 1]]
    assert np.array_equal(live, ids != 0)


def assert_refused(operator, message, position=None, value=None, **options):
    given = arguments(operator)
    if position is not None:
        given[position] = value
    with pytest.raises(ValueError, match=f"^{operator.__name__}: .*{message}"):
        operator(*given, **options)


@every_operator
def test_arguments_of_all_are_refused_by_name(operator):
    assert_refused(operator, "chunk_size must be at least 1, not 0", chunk_size=0)
    assert_refused(operator, "no implementation 'cudnn'; valid: auto, xla, reference", implementation="cudnn")
    assert_refused(operator, r"initial_state must have shape \(2, ", initial_state=jnp.zeros((BATCH, 7, 7, 7, 7)))
    assert_refused(operator, r"segment_ids must have shape \(2, 64\)", segment_ids=jnp.ones((BATCH, 63), jnp.int32))
    assert_refused(operator, "segment_ids must be integers", segment_ids=jnp.ones((BATCH, TIME)))
    ids = jnp.ones((BATCH, TIME), jnp.int32).at[1, 10:20].set(4).at[1, 25].set(0)
    assert_refused(operator, "segment_ids of row 1 go back and forth: 1 returns after another", segment_ids=ids)


@pytest.mark.parametrize(
    ("operator", "position", "value", "message"),
    [
        (selective_scan, 0, np.zeros((2, 64)), r"u must be \[batch, time, channels\], not shape \(2, 64\)"),
        (selective_scan, 1, np.zeros((2, 64, 9)), r"dt must have shape \(2, 64, 8\), not \(2, 64, 9\)"),
        (selective_scan, 1, np.full((2, 64, 8), -0.5), "dt must be at least 0 everywhere, not -0.5"),
        (selective_scan, 2, np.full((8, 16), 0.5), "A must be at most 0 everywhere, not 0.5"),
        (selective_scan, 4, np.zeros((2, 64, 17)), "C must have shape"),
        (linear_attention, 0, np.zeros((2, 64, 3, 16)), r"k must have shape \(2, 64, 3, 16\)"),
        (linear_attention, 2, np.zeros((2, 64, 5, 8)), "v has 5 heads, not a multiple of the 2 of q and k"),
        (
            linear_attention,
            3,
            np.zeros((2, 64, 2)),
            r"shape \(2, 64, 4\) or \(2, 64, 4, 16\) or \(4,\)",
        ),
        (linear_attention, 3, np.full((2, 64, 4), 0.25), "log_decay must be at most 0 everywhere, not 0.25"),
        (delta_rule, 3, np.zeros((2, 64, 2)), r"beta must have shape \(2, 64, 4\)"),
        (delta_rule, 4, np.zeros(4), "log_decay must have shape"),
        (delta_rule, 4, np.full((2, 64, 4, 16), 1e-3), "log_decay must be at most 0"),
        (linear_recurrence, 0, np.zeros((2, 64, 7)), "log_a must have shape"),
        (linear_recurrence, 0, np.full((2, 64, 8), 1.0), "log_a must be at most 0 everywhere, not 1"),
        (short_convolution, 1, np.zeros((0, 8)), "w must have at least 1 tap, not 0"),
        (short_convolution, 1, np.zeros((4, 9)), r"w must have shape \(4, 8\)"),
    ],
)
def test_wrong_arguments_are_named(operator, position, value, message):
    assert_refused(operator, message, position, value)
