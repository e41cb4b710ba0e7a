"""Every optimizer against the algorithm of its paper, written out in float64, and what is common to all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.parameters import ZEROS, Declaration, parameter_table
from efficient_lm.spec import OneOf, Spec
from efficient_lm.training.optimizers import OptimizerSpec
from efficient_lm.training.optimizers.adafactor import AdafactorSpec
from efficient_lm.training.optimizers.adamw import AdamWSpec
from efficient_lm.training.optimizers.lion import LionSpec
from efficient_lm.training.optimizers.muon import MuonSpec
from efficient_lm.training.optimizers.schedule_free import ScheduleFreeAdamWSpec, ScheduleFreeSGDSpec, gradient_point
from efficient_lm.training.optimizers.sgd import SGDSaISpec, SGDSpec
from efficient_lm.training.optimizers.soap import SOAPSpec
from efficient_lm.training.optimizers.sophia import SophiaSpec
from efficient_lm.training.precision import PrecisionSpec
from efficient_lm.validation import validate


class Holder(Spec):
    optimizer: OneOf[OptimizerSpec]


DECLARATIONS = {
    "embedding": {"tokens": Declaration((7, 3), ("vocab", "embed"), False, None, ZEROS)},
    "stack": {
        "experts": Declaration((2, 2, 3, 4), ("layers", "experts", "embed", "mlp"), True, ((2,), (3,)), ZEROS),
        "heads": Declaration((2, 3, 2, 2), ("layers", "embed", "heads", "head_dim"), True, ((1,), (2, 3)), ZEROS),
        "bias": Declaration((2, 4), ("layers", "mlp"), False, None, ZEROS),
    },
    "norm": {"scale": Declaration((3,), ("embed",), False, None, ZEROS)},
}
TABLE = parameter_table(DECLARATIONS)


def drawn(seed):
    """A tree in the shape of `DECLARATIONS`, normal."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda declared: jnp.asarray(random.standard_normal(declared.shape), jnp.float32),
        DECLARATIONS,
        is_leaf=lambda leaf: isinstance(leaf, Declaration),
    )


def rate(step):
    return 0.1 / (1 + step)


def moved(spec, gradients, **options):
    """Parameters after a step with each of the gradients, by path."""
    params = drawn(0)
    optimizer = spec.build(rate, DECLARATIONS, **options)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return by_path(params)


def by_path(tree):
    return {name: np.asarray(leaf) for (name, _), leaf in zip(TABLE, jax.tree.leaves(tree), strict=True)}


def pieces(declared, value):
    """float64 `[many, inputs, outputs]` of matrices, or `[many, size]` of the vectors of layers."""
    value = np.moveaxis(np.asarray(value, np.float64), declared.batch_axes, range(len(declared.batch_axes)))
    many = value.shape[: len(declared.batch_axes)]
    if declared.matrix is None:
        return value.reshape(int(np.prod(many)), -1)
    return value.reshape(int(np.prod(many)), np.prod([declared.shape[axis] for axis in declared.matrix[0]]), -1)


# The algorithms: each is given one matrix or vector, its gradients, and yields what a learning rate of 1 subtracts.


def adam(gradients, beta1, beta2, epsilon):
    first = second = 0.0
    for step, gradient in enumerate(gradients, 1):
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        yield first / (1 - beta1**step) / (np.sqrt(second / (1 - beta2**step)) + epsilon)


def adamw(spec, declared, gradients):
    """Loshchilov & Hutter 2019, algorithm 2."""
    return adam(gradients, spec.beta1, spec.beta2, spec.epsilon)


def sgd(spec, declared, gradients):
    buffer = 0.0
    for gradient in gradients:
        buffer = spec.momentum * buffer + gradient
        yield gradient + spec.momentum * buffer if spec.nesterov else buffer


def lion(spec, declared, gradients):
    """Chen et al. 2023, algorithm 2."""
    momentum = 0.0
    for gradient in gradients:
        yield np.sign(spec.beta1 * momentum + (1 - spec.beta1) * gradient)
        momentum = spec.beta2 * momentum + (1 - spec.beta2) * gradient


def muon(spec, declared, gradients):
    """Jordan et al. 2024, with the bias corrections of Optax; scaled as Liu et al. 2025, equation 4."""
    if declared.matrix is None or "vocab" in declared.axes:
        yield from adamw(spec, declared, gradients)
        return
    momentum, beta = 0.0, spec.momentum
    for step, gradient in enumerate(gradients, 1):
        momentum = beta * momentum + (1 - beta) * gradient
        x = beta * momentum / (1 - beta ** (step + 1)) + (1 - beta) * gradient / (1 - beta**step)
        x = x / np.linalg.norm(x)
        x = x.T if x.shape[0] > x.shape[1] else x
        for _ in range(spec.iterations):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.T if x.shape != gradient.shape else x
        yield x * spec.update_rms * max(x.shape) ** 0.5


def soap(spec, declared, gradients):
    """Vyas et al. 2024, algorithms 3 and 4; the first gradient only finds the bases."""
    if declared.matrix is None:
        yield from adamw(spec, declared, gradients)
        return
    beta1, beta2 = spec.beta1, spec.beta2
    first = second = 0.0
    for count, gradient in enumerate(gradients):
        outer = [gradient @ gradient.T, gradient.T @ gradient]
        if count == 0:
            sides = [(1 - beta2) * product for product in outer]
            bases = [np.linalg.eigh(side)[1][:, ::-1] for side in sides]
            yield np.zeros_like(gradient)
            continue
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * (bases[0].T @ gradient @ bases[1]) ** 2
        turned = bases[0].T @ (first / (1 - beta1**count)) @ bases[1]
        turned = turned / (np.sqrt(second / (1 - beta2**count)) + spec.epsilon)
        yield bases[0] @ turned @ bases[1].T
        sides = [beta2 * side + (1 - beta2) * product for side, product in zip(sides, outer, strict=True)]
        if count % spec.interval == 0:
            bases = [np.linalg.qr(side @ basis)[0] for side, basis in zip(sides, bases, strict=True)]


def by_hand(algorithm, spec, declared, start, gradients):
    """One parameter after the steps, in float64, each matrix or vector by itself."""
    values, gradients = pieces(declared, start), [pieces(declared, gradient) for gradient in gradients]
    for at in range(len(values)):
        directions = algorithm(spec, declared, [gradient[at] for gradient in gradients])
        for step, direction in enumerate(directions):
            decay = spec.weight_decay * values[at] if declared.decay else 0.0
            values[at] = values[at] - rate(step) * (direction + decay)
    return values


ALGORITHMS = [
    (adamw, AdamWSpec(weight_decay=0.3)),
    (sgd, SGDSpec(weight_decay=0.3)),
    (sgd, SGDSpec(nesterov=True)),
    (lion, LionSpec()),
    (muon, MuonSpec(weight_decay=0.3)),
    (soap, SOAPSpec(weight_decay=0.3, interval=2)),
]


@pytest.mark.parametrize(
    ("algorithm", "spec"), ALGORITHMS, ids=[f"{spec.kind}{n}" for n, (_, spec) in enumerate(ALGORITHMS)]
)
def test_steps_are_those_of_the_paper(algorithm, spec):
    gradients = [drawn(seed) for seed in range(1, 6)]
    found, start, series = moved(spec, gradients), by_path(drawn(0)), [by_path(gradient) for gradient in gradients]
    for name, declared in TABLE:
        wanted = by_hand(algorithm, spec, declared, start[name], [gradient[name] for gradient in series])
        np.testing.assert_allclose(pieces(declared, found[name]), wanted, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_adafactor_is_that_of_the_paper(momentum):
    """Shazeer & Stern 2018, algorithms 4 and 5, matrix by matrix."""
    spec, gradients = AdafactorSpec(momentum=momentum), [drawn(seed) for seed in range(1, 5)]
    found, start, series = moved(spec, gradients), by_path(drawn(0)), [by_path(gradient) for gradient in gradients]

    def size(x):
        return np.sqrt(np.mean(x**2))

    for name, declared in TABLE:
        values = pieces(declared, start[name])
        for at in range(len(values)):
            value, rows, columns, full, mean = values[at], 0.0, 0.0, 0.0, 0.0
            for step, gradient in enumerate([pieces(declared, gradient[name])[at] for gradient in series]):
                kept, square = 1 - (step + 1.0) ** -0.8, gradient**2 + 1e-30
                if declared.matrix is None:
                    full = kept * full + (1 - kept) * square
                    direction = gradient / np.sqrt(full)
                else:
                    rows = kept * rows + (1 - kept) * square.sum(axis=1)
                    columns = kept * columns + (1 - kept) * square.sum(axis=0)
                    direction = gradient / np.sqrt(np.outer(rows, columns) / rows.sum())
                direction = direction / max(1.0, size(direction)) * max(1e-3, size(value))
                mean = direction if momentum is None else momentum * mean + (1 - momentum) * direction
                decay = spec.weight_decay * value if declared.decay else 0.0
                value = value - rate(step) * (mean + decay)
            np.testing.assert_allclose(pieces(declared, found[name])[at], value, rtol=1e-4, atol=2e-5, err_msg=name)


def test_sgd_sai_is_that_of_the_paper():
    """Xu et al. 2024: rates from the signal-to-noise ratio of the first gradient, relative to the largest."""
    spec, gradients = SGDSaISpec(weight_decay=0.3), [drawn(seed) for seed in range(1, 5)]
    gradients[0]["norm"]["scale"] = jnp.full(3, 0.5)
    found, start, series = moved(spec, gradients), by_path(drawn(0)), [by_path(gradient) for gradient in gradients]
    ratios = {
        name: [
            np.linalg.norm(each) / np.std(each) if np.std(each) else each.size**0.5
            for each in pieces(declared, series[0][name])
        ]
        for name, declared in TABLE
    }
    largest = max(ratio for each in ratios.values() for ratio in each)
    for name, declared in TABLE:
        values = pieces(declared, start[name])
        for at, ratio in enumerate(ratios[name]):
            momentum = pieces(declared, series[0][name])[at]
            for step, gradient in enumerate([pieces(declared, gradient[name])[at] for gradient in series]):
                momentum = 0.9 * momentum + 0.1 * gradient if step else gradient
                decay = spec.weight_decay * values[at] if declared.decay else 0.0
                values[at] = values[at] - rate(step) * (ratio / largest * momentum + decay)
        np.testing.assert_allclose(pieces(declared, found[name]), values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_sophia_is_that_of_the_paper():
    """Liu et al. 2023, algorithm 3, with an estimate of the curvature every second step."""
    spec = SophiaSpec(interval=2, gamma=2.0)
    gradients, curvatures = (
        [drawn(seed) for seed in range(1, 6)],
        [jax.tree.map(jnp.abs, drawn(9 + n)) for n in range(5)],
    )
    params, optimizer = drawn(0), spec.build(rate, DECLARATIONS)
    state = optimizer.init(params)
    for gradient, diagonal in zip(gradients, curvatures, strict=True):
        updates, state = optimizer.update(gradient, state, params, curvature=lambda found=diagonal: found)
        params = jax.tree.map(jnp.add, params, updates)
    found, start = by_path(params), by_path(drawn(0))
    clipped = 0
    for name, declared in TABLE:
        value, mean, bend = np.asarray(start[name], np.float64), 0.0, 0.0
        for step in range(5):
            mean = spec.beta1 * mean + (1 - spec.beta1) * by_path(gradients[step])[name]
            if step % 2 == 0:
                bend = spec.beta2 * bend + (1 - spec.beta2) * by_path(curvatures[step])[name]
            ratio = mean / np.maximum(spec.gamma * bend, spec.epsilon)
            clipped += np.mean(np.abs(ratio) > 1) / len(TABLE) / 5
            decay = spec.weight_decay * value if declared.decay else 0.0
            value = value - rate(step) * (np.clip(ratio, -1, 1) + decay)
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert 0.2 < clipped < 0.9


@pytest.mark.parametrize(
    "spec", [ScheduleFreeAdamWSpec(), ScheduleFreeSGDSpec(weight_decay=0.3)], ids=lambda spec: spec.kind
)
def test_schedule_free_is_that_of_the_paper(spec):
    """Defazio et al. 2024, algorithm 1: parameters are the average `x`, and gradients are taken at `y`."""
    slopes = [drawn(seed) for seed in range(1, 5)]
    params, optimizer = drawn(0), spec.build(rate, DECLARATIONS)
    state = optimizer.init(params)
    for slope in slopes:
        # A gradient that depends on where it is taken.
        gradient = jax.tree.map(jnp.multiply, slope, gradient_point(params, state))
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    found, start = by_path(params), by_path(drawn(0))
    for name, declared in TABLE:
        x = z = np.asarray(start[name], np.float64)
        square, weights, largest = 0.0, 0.0, 0.0
        for step, slope in enumerate(slopes):
            y = (1 - spec.beta) * z + spec.beta * x
            gradient = direction = y * by_path(slope)[name]
            if isinstance(spec, ScheduleFreeAdamWSpec):
                square = spec.beta2 * square + (1 - spec.beta2) * gradient**2
                direction = gradient / (np.sqrt(square / (1 - spec.beta2 ** (step + 1))) + spec.epsilon)
            z = z - rate(step) * (direction + (spec.weight_decay * y if declared.decay else 0.0))
            largest = max(largest, rate(step))
            weights += largest**2
            x = x + largest**2 / weights * (z - x)
        np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-5, err_msg=name)


def test_muon_makes_each_layer_and_expert_orthogonal():
    spec = MuonSpec(weight_decay=0.0, iterations=5)
    params, gradient = drawn(0), drawn(1)
    # Matrices of very different size: orthogonalised together, the small ones would come out near zero.
    sizes = jnp.asarray([[1.0, 1e-3], [1e-2, 10.0]])[:, :, None, None]
    gradient["stack"]["experts"] = gradient["stack"]["experts"] * sizes
    optimizer = spec.build(lambda step: 1.0, DECLARATIONS)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    for name in ("experts", "heads"):
        declared = DECLARATIONS["stack"][name]
        for matrix in pieces(declared, updates["stack"][name]) / (0.2 * 4**0.5):
            values = np.linalg.svd(matrix, compute_uv=False)
            assert np.all((values > 0.5) & (values < 1.3)), (name, values)
    # A first step of Adam is the gradient's sign.
    for path in (("embedding", "tokens"), ("stack", "bias"), ("norm", "scale")):
        np.testing.assert_allclose(updates[path[0]][path[1]], -jnp.sign(gradient[path[0]][path[1]]), rtol=1e-4)


def test_decay_touches_only_what_declares_it():
    zero = jax.tree.map(jnp.zeros_like, drawn(0))
    found, start = moved(AdamWSpec(weight_decay=0.1), [zero]), by_path(drawn(0))
    for name, declared in TABLE:
        np.testing.assert_allclose(found[name], (0.99 if declared.decay else 1.0) * start[name], rtol=1e-6)


def test_multipliers_are_other_learning_rates():
    gradients, start = [drawn(1)], by_path(drawn(0))
    whole, half = moved(AdamWSpec(), gradients), moved(AdamWSpec(), gradients, multipliers=0.5)
    tree = jax.tree.map(lambda leaf: 1.0, drawn(0)) | {"norm": {"scale": 0.0}}
    tree["stack"] |= {"heads": 0.5}
    mixed = moved(AdamWSpec(), gradients, multipliers=tree)
    for name, _ in TABLE:
        np.testing.assert_allclose(half[name] - start[name], 0.5 * (whole[name] - start[name]), rtol=1e-4, atol=1e-6)
        wanted = {"norm.scale": start, "stack.heads": half}.get(name, whole)
        np.testing.assert_array_equal(mixed[name], wanted[name])


def test_state_is_float32_under_any_compute_type():
    state = AdamWSpec().build(lambda step: 1.0, DECLARATIONS).init(drawn(0))
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert len(floats) == 2 * len(TABLE) and all(leaf.dtype == jnp.float32 for leaf in floats)
    assert PrecisionSpec(compute="bfloat16").dtype == jnp.bfloat16
    assert PrecisionSpec().dtype == jnp.float32


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "adam"}, "optimizer.kind: unknown optimizer kind 'adam'; did you mean 'adamw'"),
        ({"kind": "adamw", "learning_rate": 0}, "optimizer.learning_rate: expected a number above 0"),
        ({"kind": "adamw", "beta2": 1.5}, "optimizer.beta2: expected at most 1; got 1.5"),
        ({"kind": "adamw", "weight_decay": -0.1}, "optimizer.weight_decay: expected at least 0; got -0.1"),
        ({"kind": "lion", "state": "int4"}, "optimizer.state: "),
        ({"kind": "muon", "epsilom": 1.0}, "optimizer.epsilom: .*did you mean 'epsilon'"),
    ],
)
def test_faults(values, said):
    with pytest.raises(ConfigError, match=said):
        validate(Holder, {"optimizer": values})
