"""The training step: loss, gradients, one division, clipping, update, and a guard against what is not a number."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from efficient_lm.elastic.nesting import WHOLE, Loss, NestingSpec
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters
from efficient_lm.objectives.base import Batch, ObjectiveSpec, Sums
from efficient_lm.training.freezing import Trainable, masked, without_frozen
from efficient_lm.training.parallelism import Layout

State = dict[str, Any]
"""`parameters`, `optimizer` (Optax state), and int32 scalars `step` and `nonfinite` (steps in a row)."""


def initial_state(params: Parameters, optimizer: optax.GradientTransformation) -> State:
    """Parameters with a fresh optimizer state, at step 0."""
    zero = jnp.zeros((), jnp.int32)
    return {"parameters": params, "optimizer": optimizer.init(params), "step": zero, "nonfinite": zero}


def state_shardings(model: LanguageModel, optimizer: optax.GradientTransformation, layout: Layout) -> State:
    """The sharding of every array of the state; each moment lives where its parameter does."""
    parameters = layout.parameters(model.declarations)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    moments = optax.tree_map_params(
        optimizer,
        lambda moment, sharding: moment if _is_absent(moment) else sharding,
        jax.eval_shape(optimizer.init, abstract),
        parameters,
        transform_non_params=lambda _: layout.replicated,
        is_leaf=_is_absent,
    )
    return {
        "parameters": parameters,
        "optimizer": moments,
        "step": layout.replicated,
        "nonfinite": layout.replicated,
    }


def _is_absent(moment: Any) -> bool:
    """Whether a parameter has no moment, because it is frozen."""
    return isinstance(moment, optax.MaskedNode)


def abstract_state(model: LanguageModel, optimizer: optax.GradientTransformation, layout: Layout) -> State:
    """Shape, dtype and sharding of every array of the state; nothing is allocated."""
    shapes = jax.eval_shape(lambda: initial_state(model.init(jax.random.key(0)), optimizer))
    shardings = state_shardings(model, optimizer, layout)
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
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """A function ``(state, batch) -> (state, metrics)``, to be jitted with the state donated.

    Args:
        accumulate: micro-batches a batch is cut into; sums are added and divided once.
        clip_norm: bound of the gradient's global L2 norm.
        dtype: of the computation; parameters, gradients and optimizer state are float32.
        packed: False promises that every row is one whole document.
        seed: of what is random in a step; with the step's number it gives the same numbers again.
        nesting: which models inside an elastic one it computes.
        chosen: which parameters change (see `training.freezing`); None: all. The norm is of their gradient.

    The metrics are float32 scalars: `loss` (cross entropy per token, nats), `weight` (tokens), `grad_norm` before
    clipping, `finite`, `nonfinite` (steps in a row), and the objective's own per token.
    """

    loss = Loss(objective, dtype, packed, lambda params: without_frozen(params, chosen))
    gradient = nesting.gradient(model, loss)

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        params = state["parameters"]
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        grads, sums = _accumulated(gradient, params, batch, key, accumulate)
        grads = masked(grads, chosen)
        count = jnp.maximum(sums.weight, 1.0)
        norm = optax.tree.norm(grads) / count
        finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm)
        grads = _scaled(grads, _clipping(norm, clip_norm) / count)
        updates, moments = optimizer.update(grads, state["optimizer"], params)
        moved = model.corrected(optax.apply_updates(params, masked(updates, chosen)), sums.counts)
        new = {"parameters": moved, "optimizer": moments}
        # A step that is not a number changes nothing but the counters.
        new = jax.tree.map(
            lambda after, before: jnp.where(finite, after, before), new, {key: state[key] for key in new}
        )
        nonfinite = jnp.where(finite, 0, state["nonfinite"] + 1)
        metrics = {name: value / count for name, value in sums.metrics.items()}
        metrics = {"loss": metrics.pop("cross_entropy"), **metrics}
        metrics |= {"weight": sums.weight, "grad_norm": norm, "nonfinite": nonfinite.astype(jnp.float32)}
        return {**new, "step": state["step"] + 1, "nonfinite": nonfinite}, metrics

    return step


def _clipping(norm: jax.Array, bound: float | None) -> jax.Array | float:
    return 1.0 if bound is None else jnp.minimum(1.0, bound / jnp.maximum(norm, 1e-12))


def _scaled(tree: Any, factor: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf * factor, tree)


def _accumulated(gradient: Callable, params: Parameters, batch: Batch, key: jax.Array, pieces: int) -> tuple[Any, Sums]:
    """Gradients and sums over `pieces` micro-batches, one after the other, each with random numbers of its own."""
    if pieces == 1:
        return gradient(params, batch, key)

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
