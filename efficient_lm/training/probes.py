"""Probes: sizes of gradients, parameters, updates and activations by layer, every so many steps.

They are computed by a program beside the training step, from the state in front of the step and its batch. The step
itself is the same program with probes and without, so a run with probes has the same bits as one without. A probe costs
about one and a third steps of the device's time: a pass forward and backward, and one more forward.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efficient_lm.models.context import Context
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters
from efficient_lm.models.traversal import Passage, Runs, State, Traversal
from efficient_lm.objectives.base import Batch, context_of
from efficient_lm.spec import Count, Spec

PROBES_FILE = "probes.jsonl"


class ProbesSpec(Spec):
    """Sizes by layer.

    Attributes:
        every: steps between two of them.
    """

    every: Count = 100


class Sizes(NamedTuple):
    """Of one parameter, or of each layer's in a stack ``[repeats]``; float32.

    Attributes:
        grad_norm, weight_norm, update_norm: L2 norms of its gradient before clipping, of itself before the step, and of
            what the step changes it by.
        grad_max, weight_max: largest magnitudes.
    """

    grad_norm: jax.Array
    grad_max: jax.Array
    weight_norm: jax.Array
    weight_max: jax.Array
    update_norm: jax.Array


def parameter_sizes(grads: Parameters, before: Parameters, after: Parameters) -> dict[str, Any]:
    """The `Sizes` of every parameter, in the shape of the parameters; those in the stack keep the layers apart."""

    def sizes(path: Any, grad: jax.Array, before: jax.Array, after: jax.Array) -> Sizes:
        axes = tuple(range(1, grad.ndim)) if path[0].key == "stack" else None

        def norm(values: jax.Array) -> jax.Array:
            return jnp.sqrt(jnp.sum(jnp.square(values.astype(jnp.float32)), axis=axes))

        def largest(values: jax.Array) -> jax.Array:
            return jnp.max(jnp.abs(values), axis=axes).astype(jnp.float32)

        return Sizes(norm(grad), largest(grad), norm(before), largest(before), norm(after - before))

    return jax.tree_util.tree_map_with_path(sizes, grads, before, after)


class _Activations(Traversal):
    """Goes along with the tokens and measures the residual stream behind each layer."""

    def __init__(self, layers: int):
        self.tables = jnp.arange(layers)

    def start(self, x: jax.Array) -> State:
        zeros = jnp.zeros(self.tables.shape, jnp.float32)
        return {"stream_rms": zeros, "stream_max": zeros, "added_rms": zeros}

    def watch(self, state: State, table: Any, passage: Passage, runs: Runs | None, context: Context) -> State:
        live = (context.segment_ids != 0)[..., None]
        after, before = passage.after.astype(jnp.float32), passage.before.astype(jnp.float32)
        count = jnp.maximum(jnp.sum(live), 1) * (after.size // live.size)

        def rms(x: jax.Array) -> jax.Array:
            return jnp.sqrt(jnp.sum(jnp.where(live, x * x, 0.0)) / count)

        found = {
            "stream_rms": rms(after),
            "stream_max": jnp.max(jnp.where(live, jnp.abs(after), 0.0)),
            "added_rms": rms(after - before),
        }
        return {name: values.at[table].set(found[name]) for name, values in state.items()}


def activation_sizes(
    model: LanguageModel, params: Parameters, batch: Batch, dtype: jax.typing.DTypeLike
) -> dict[str, jax.Array]:
    """Of the residual stream behind each layer, float32 ``[layers]``, over all tokens that are no padding:

    `stream_rms`, `stream_max` (largest magnitude), and `added_rms`, of what the layer adds to it. Nothing is random.
    """
    x, context, _ = model.entered(params, batch["tokens"], context_of(batch), None, dtype)
    *_, found = model.stack(params["stack"], x, context, None, _Activations(len(model.layers)))
    return found


def make_probe(step: Callable, model: LanguageModel, dtype: jax.typing.DTypeLike) -> Callable[[Any, Batch], Any]:
    """A function ``(state, batch) -> sizes``, to be jitted; `step` is of `make_step`, looking at `parameter_sizes`."""

    def probe(state: dict[str, Any], batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        # All of the step's results but what was seen is dead code.
        return step(state, batch)[1]["seen"], activation_sizes(model, state["parameters"], batch, dtype)

    return probe


def probe_row(model: LanguageModel, found: Any) -> dict[str, float | None]:
    """What a probe found, read from the device: ``grad_norm/layer_3.mixer.inner.query.weight`` and so on.

    Of each parameter and layer `grad_norm`, `grad_rms`, `grad_max`, `weight_norm`, `weight_rms`, `weight_max` and
    `update_ratio`: the norm of the update over that of the parameter (None where that is zero). Of each layer what
    `activation_sizes` returns.
    """
    sizes, activations = jax.device_get(found)
    row: dict[str, float | None] = {}
    for name, values in activations.items():
        row |= {f"{name}/layer_{number}": float(value) for number, value in enumerate(values)}
    outer = {name: part for name, part in sizes.items() if name != "stack"}
    declared = {name: part for name, part in model.declarations.items() if name != "stack"}
    row |= _figures(outer, declared)
    for number, (segment, place, index) in enumerate(model.stack.places):
        mine = jax.tree.map(lambda values, index=index: values[index], sizes["stack"][segment][place])
        row |= _figures(mine, model.stack.declarations[segment][place], f"layer_{number}.", stacked=True)
    return row


def _figures(sizes: Any, declarations: Any, prefix: str = "", stacked: bool = False) -> dict[str, float | None]:
    row: dict[str, float | None] = {}
    for path, found in jax.tree.leaves_with_path(sizes, is_leaf=lambda leaf: isinstance(leaf, Sizes)):
        declared = declarations
        for key in path:
            declared = declared[key.key]
        name = prefix + ".".join(key.key for key in path)
        root = math.sqrt(declared.size / (declared.shape[0] if stacked else 1))
        grad_norm, grad_max, weight_norm, weight_max, update_norm = map(float, found)
        figures = {
            "grad_norm": grad_norm,
            "grad_rms": grad_norm / root,
            "grad_max": grad_max,
            "weight_norm": weight_norm,
            "weight_rms": weight_norm / root,
            "weight_max": weight_max,
            "update_ratio": update_norm / weight_norm if weight_norm else None,
        }
        row |= {f"{figure}/{name}": value for figure, value in figures.items()}
    return row
