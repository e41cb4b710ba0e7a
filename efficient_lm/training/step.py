"""The training step: loss, gradients, one division, clipping, update, and a guard against what is not a number."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from efficient_lm.elastic.nesting import WHOLE, Loss, NestingSpec
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters
from efficient_lm.objectives.base import Batch, ObjectiveSpec, Sums
from efficient_lm.training.averaging import AverageSpec
from efficient_lm.training.freezing import Trainable, masked, without_frozen
from efficient_lm.training.moments import is_quantized
from efficient_lm.training.optimizers.schedule_free import followed, gradient_point
from efficient_lm.training.parallelism import Layout
from efficient_lm.training.spikes import SpikeSpec
from kernels_pallas import partition

State = dict[str, Any]
"""`parameters`, `optimizer` (Optax state), and int32 scalars `step` and `nonfinite` (steps in a row); with
`train.average` also `average`, in the shape of the parameters."""


NO_SPIKES = SpikeSpec()
"""Looks for none."""


def initial_state(params: Parameters, optimizer: optax.GradientTransformation, averaged: bool = False) -> State:
    """Parameters with a fresh optimizer state, at step 0; with their average, if it is kept."""
    zero = jnp.zeros((), jnp.int32)
    state = {"parameters": params, "optimizer": optimizer.init(params), "step": zero, "nonfinite": zero}
    return state | ({"average": jax.tree.map(jnp.copy, params)} if averaged else {})


def state_shardings(
    model: LanguageModel, optimizer: optax.GradientTransformation, layout: Layout, averaged: bool = False
) -> State:
    """The sharding of every array of the state; each moment lives where its parameter does."""
    parameters = layout.parameters(model.declarations)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    moments = optax.tree_map_params(
        optimizer,
        _beside,
        jax.eval_shape(optimizer.init, abstract),
        abstract,
        parameters,
        transform_non_params=lambda _: layout.replicated,
        is_leaf=_is_one,
    )
    state = {
        "parameters": parameters,
        "optimizer": moments,
        "step": layout.replicated,
        "nonfinite": layout.replicated,
    }
    return state | ({"average": parameters} if averaged else {})


def _is_one(moment: Any) -> bool:
    """Whether it is all that an optimizer keeps of a parameter: nothing, where it is frozen, or codes and scales."""
    return isinstance(moment, optax.MaskedNode) or is_quantized(moment)


def _beside(moment: Any, parameter: jax.ShapeDtypeStruct, sharding: NamedSharding) -> Any:
    """The sharding of what an optimizer keeps of a parameter: as the parameter's, on the axes that it divides too."""

    def place(array: jax.ShapeDtypeStruct) -> NamedSharding:
        if array.shape == parameter.shape:
            return sharding
        axes = []
        for size, names in zip(array.shape, sharding.spec, strict=False):
            several = names if isinstance(names, tuple) else () if names is None else (names,)
            axes.append(names if size % math.prod(sharding.mesh.shape[name] for name in several) == 0 else None)
        return NamedSharding(sharding.mesh, P(*axes))

    return jax.tree.map(place, moment)


def abstract_state(
    model: LanguageModel, optimizer: optax.GradientTransformation, layout: Layout, averaged: bool = False
) -> State:
    """Shape, dtype and sharding of every array of the state; nothing is allocated."""
    shapes = jax.eval_shape(lambda: initial_state(model.init(jax.random.key(0)), optimizer, averaged))
    shardings = state_shardings(model, optimizer, layout, averaged)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
    )


def make_step(
    model: LanguageModel,
    objective: ObjectiveSpec,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    clip_norm: float | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    packed: bool = True,
    seed: int = 0,
    chosen: Trainable | None = None,
    nesting: NestingSpec = WHOLE,
    spike: SpikeSpec = NO_SPIKES,
    look: Callable[[Parameters, Parameters, Parameters], Any] | None = None,
    average: AverageSpec | None = None,
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """A function ``(state, batch) -> (state, metrics)``, to be jitted with the state donated.

    Args:
        accumulate: micro-batches a batch is cut into; sums are added and divided once.
        clip_norm: bound of the gradient's global L2 norm.
        dtype: of the computation; parameters, gradients and optimizer state are float32.
        packed: False promises that every row is one whole document.
        seed: of what is random in a step; with the step's number it gives the same numbers again.
        nesting: which models inside an elastic one it computes.
        spike: what stands out, and whether such a step changes anything; then the state also has `spikes`.
        chosen: which parameters change (see `training.freezing`); None: all. The norm is of their gradient.
        look: ``look(gradient before clipping, parameters before, parameters after)``, whose result is `seen` in the
            metrics; None looks at nothing.
        average: the average of the parameters that is kept.

    The metrics are float32 scalars: `loss` (cross entropy per token, nats), `weight` (tokens), `grad_norm` before
    clipping, `finite`, `nonfinite` (steps in a row), `spike` if it looks (see `SpikeSpec.look`), and the objective's
    own per token.
    """

    loss = Loss(objective, dtype, packed, lambda params: without_frozen(params, chosen))
    gradient = nesting.gradient(model, loss)
    apart = accumulate > 1 and _rows_apart(model)
    optimizer = optax.with_extra_args_support(optimizer)

    def for_drawn_targets(params: Parameters, batch: Batch, key: jax.Array) -> tuple[Any, Sums]:
        drawn = objective.drawn(model, params, batch, dtype, packed, jax.random.fold_in(key, 1))
        return gradient(params, drawn, key)

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        params, point = state["parameters"], gradient_point(state["parameters"], state["optimizer"])
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        grads, sums = _accumulated(gradient, point, batch, key, accumulate, apart)
        grads = masked(grads, chosen)
        count = jnp.maximum(sums.weight, 1.0)
        norm = optax.tree.norm(grads) / count
        finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm)
        unclipped, grads = grads, _scaled(grads, _clipping(norm, clip_norm) / count)

        def curvature() -> Parameters:
            """The diagonal that Sophia asks for: squared gradients of drawn targets (Liu et al. 2023, algorithm 2)."""
            found, drawn = _accumulated(for_drawn_targets, point, batch, key, accumulate, apart)
            return jax.tree.map(lambda grad: jnp.square(grad) / jnp.maximum(drawn.weight, 1.0), found)

        updates, moments = optimizer.update(grads, state["optimizer"], params, curvature=curvature)
        updated = optax.apply_updates(params, masked(updates, chosen))
        moved = model.corrected(updated, sums.counts)
        new = {"parameters": moved, "optimizer": followed(moments, updated, moved)}
        if average is not None:
            new["average"] = average.moved(state["average"], moved, state["step"])
        accepted, watched = finite, {}
        if spike.looks:
            score, watched["spikes"] = spike.look(state["spikes"], sums.metrics["cross_entropy"] / count, norm, finite)
            accepted = finite & (score <= spike.threshold) if spike.action == "skip" else finite
        # A step that is not a number, or to be skipped, changes nothing but the counters.
        new = jax.tree.map(
            lambda after, before: jnp.where(accepted, after, before), new, {key: state[key] for key in new}
        )
        nonfinite = jnp.where(finite, 0, state["nonfinite"] + 1)
        metrics = {name: value / count for name, value in sums.metrics.items()}
        metrics = {"loss": metrics.pop("cross_entropy"), **metrics}
        metrics |= {"weight": sums.weight, "grad_norm": norm, "nonfinite": nonfinite.astype(jnp.float32)}
        if look is not None:
            metrics["seen"] = look(_scaled(unclipped, 1 / count), params, new["parameters"])
        if spike.looks:
            metrics["spike"] = score
        return {**new, **watched, "step": state["step"] + 1, "nonfinite": nonfinite}, metrics

    return step


def _clipping(norm: jax.Array, bound: float | None) -> jax.Array | float:
    return 1.0 if bound is None else jnp.minimum(1.0, bound / jnp.maximum(norm, 1e-12))


def _scaled(tree: Any, factor: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf * factor, tree)


def _rows_apart(model: LanguageModel) -> bool:
    """Whether the sums of rows are those of each row by itself: nothing is random, or balanced or counted over rows."""
    if model.exits is not None or any(layer.depth is not None for layer in model.layers):
        return False
    shapes = jax.eval_shape(lambda: model.hidden(model.init(jax.random.key(0)), jnp.zeros((1, 2), jnp.int32))[2])
    return not jax.tree.leaves((shapes.losses, shapes.observed))


def _accumulated(
    gradient: Callable, params: Parameters, batch: Batch, key: jax.Array, pieces: int, apart: bool
) -> tuple[Any, Sums]:
    """Gradients and sums over `pieces` micro-batches, one after the other, each with random numbers of its own.

    Where rows are `apart`, the devices of the mesh axis `data` add up their own, and exchange them once, at the end.
    """
    if pieces == 1:
        return gradient(params, batch, key)
    names = partition.divided("batch", [len(batch["tokens"]) // pieces])
    if not apart or "data" not in names or partition.holds_parameters("data"):
        return _in_turn(gradient, params, batch, key, pieces)

    def own(params: Parameters, batch: Batch, key: jax.Array) -> tuple[Any, Sums]:
        return jax.lax.psum(_in_turn(gradient, params, batch, key, pieces), "data")

    whole = P()
    over = jax.shard_map(own, in_specs=(whole, P("data"), whole), out_specs=whole, axis_names={"data"}, check_vma=False)
    return over(params, batch, key)


def _in_turn(gradient: Callable, params: Parameters, batch: Batch, key: jax.Array, pieces: int) -> tuple[Any, Sums]:
    """Gradients and sums over micro-batches, added as they come."""

    def cut(leaf: jax.Array) -> jax.Array:
        # Every piece takes its rows from each device's share, so that none has to travel.
        return jnp.swapaxes(leaf.reshape(leaf.shape[0] // pieces, pieces, *leaf.shape[1:]), 0, 1)

    def add(total: Any, step: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, *step)), None

    pieces_of_batch = jax.tree.map(cut, batch)
    first = jax.tree.map(lambda leaf: leaf[0], pieces_of_batch)
    shapes = jax.eval_shape(gradient, params, first, key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, (pieces_of_batch, jax.random.split(key, pieces)))[0]
