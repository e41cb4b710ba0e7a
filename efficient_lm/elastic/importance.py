"""What the units and layers of a model are worth, for models that were not trained to have smaller ones inside.

Units are put in order of what they are worth, which changes nothing that the model computes; the first are then a
better model than those that happened to be first (Minitron, Muralidharan et al. 2024, arXiv 2407.14679, section 2.2).
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import reduce
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_lm.data.packing import Batch
from efficient_lm.elastic.choices import Part, choose, granularities
from efficient_lm.elastic.units import Group, Worth, below, check_movable, groups_of, ordered, unit_groups
from efficient_lm.errors import ConfigError, nearest
from efficient_lm.evaluation.layerwise import Figures, Layerwise
from efficient_lm.evaluation.probes import run_listening
from efficient_lm.evaluation.rows import pieces
from efficient_lm.evaluation.token_losses import token_losses
from efficient_lm.models.block import Block, BlockSpec
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.layered import layer_declarations, layer_parameters
from efficient_lm.models.layers.groups import Groups
from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.parameters import Parameters, parameter_table

log = logging.getLogger(__name__)

Measure = Literal["activation", "gradient", "weight"]
Order = Literal["activation", "gradient", "weight", "none"]
"""What makes a unit important.

``activation``: the mean square, over tokens, of what the output map reads of it; ``gradient``: ``Σ |w ∂L/∂w|`` over its
parameters, what the loss would change without them to first order (Molchanov et al. 2019, arXiv 1906.10771);
``weight``: the sum of squares of its parameters; ``none``: its place.
"""


def measure_of(group: Group, by: Measure) -> Measure:
    """What units of a group are measured by: no map reads those of some axes, which take the gradient."""
    return "gradient" if by == "activation" and group.reader is None else by


def unit_worth(
    model: LanguageModel,
    params: Parameters,
    batch: Batch | None,
    axes: Collection[str],
    by: Measure,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Worth:
    """What the units of some axes are worth, where they may change places.

    Args:
        batch: rows of text (see `efficient_lm.data.packing.pack`); `weight` needs none.
    """
    groups = [[group for group in layer if group.axis in axes and not group.fixed] for layer in unit_groups(model)]

    def measured(measure: Measure) -> Worth:
        if measure == "activation":
            return _by_activation(model, params, batch, groups, dtype)
        values = jax.tree.map(jnp.square, params) if measure == "weight" else _effects(model, params, batch, dtype)
        return _by_parameters(model, layer_parameters(model, values), groups)

    found = {measure: measured(measure) for measure in {measure_of(group, by) for layer in groups for group in layer}}
    return [
        {group: found[measure_of(group, by)][number][group] for group in layer} for number, layer in enumerate(groups)
    ]


def layer_worth(
    model: LanguageModel, params: Parameters, batch: Batch, dtype: jax.typing.DTypeLike = jnp.float32
) -> np.ndarray:
    """How much each layer changes the residual stream: one less the mean cosine of what is before and behind it.

    float64 ``[layers]`` (ShortGPT, Men et al. 2024, arXiv 2403.03853, eq. 1).
    """
    look, count = Layerwise(model, _look_at_stream, dtype), max(int((batch["segment_ids"] > 0).sum()), 1)
    parts = [[float(layer["change"]) for layer in look.batch(params, part)] for part in pieces(batch)]
    return np.sum(parts, axis=0, dtype=np.float64) / count


def most_important(
    model: LanguageModel,
    params: Parameters,
    parts: Mapping[str, Part],
    order: Order | None,
    rows: Callable[[], Batch],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[Parameters, dict[str, Part]]:
    """The parameters, and parts of a model, in which what is first or named is what is worth most.

    Args:
        parts: as of `choose`; of layers, only a part is measured and those that stay are named.
        order: None: `activation` along axes that the model is not trained to be smaller along, and `none` along others.
        rows: text to measure on, asked for where it is needed.

    Raises:
        ConfigError: what `choose` raises, an order there is not, units that cannot change places or are trained to be
            in their order, where `order` is given.
    """
    if order is not None and order not in get_args(Order):
        raise ConfigError(f"order: {order} is none; {nearest(order, get_args(Order))}")
    choose(model, parts)  # Before any text is read.
    axes = _measured_axes(model, parts, order)
    by: Measure = "activation" if order in (None, "none") else order
    groups = [group for layer in unit_groups(model) for group in layer if group.axis in axes]
    _say(groups, by, order)
    needs_text = "layers" in axes or any(measure_of(group, by) != "weight" for group in groups if not group.fixed)
    batch = rows() if needs_text else None
    chosen = dict(parts)
    if "layers" in axes:
        worth = layer_worth(model, params, batch, dtype)
        count = len(choose(model, {"layers": parts["layers"]}).layers)
        chosen["layers"] = sorted(np.argsort(-worth, kind="stable")[:count].tolist())
    if not any(group.fixed is None for group in groups):
        return params, chosen
    return ordered(model, params, unit_worth(model, params, batch, axes - {"layers"}, by, dtype)), chosen


def _measured_axes(model: LanguageModel, parts: Mapping[str, Part], order: Order | None) -> set[str]:
    if order == "none":
        return set()
    trained = granularities(model)
    axes = {axis for axis, part in parts.items() if axis != "width" and not (axis == "layers" and _named(part))}
    for axis in sorted(axes & trained.keys()) if order is not None else ():
        raise ConfigError(f"order: the model is trained so that the first of {axis} are the ones to keep; leave it out")
    return axes - trained.keys()


def _named(layers: Part) -> bool:
    return isinstance(layers, Sequence)


def _say(groups: Sequence[Group], by: Measure, order: Order | None) -> None:
    """What is measured otherwise than asked for, once for each kind of part."""
    said = set()
    for group in groups:
        if group.fixed is not None:
            if order is not None:
                check_movable(group)
            said.add(f"{group.axis} of '{group.kind}': the first, for they cannot change places: {group.fixed}")
        elif measure_of(group, by) != by:
            said.add(f"{group.axis} of '{group.kind}': by gradient, for no map reads these units by themselves")
    for line in sorted(said):
        log.info(line)


def _by_parameters(model: LanguageModel, trees: Sequence[Parameters], groups: Sequence[Sequence[Group]]) -> Worth:
    """From a value for every parameter."""
    worth: list[dict[Group, np.ndarray]] = []
    for declared, values, layer in zip(layer_declarations(model), trees, groups, strict=True):
        worth.append({})
        for group in layer:
            table, leaves = parameter_table(below(declared, group.path)), jax.tree.leaves(below(values, group.path))
            sums = [
                group.sums(np.asarray(leaf), declaration.axes)
                for (_, declaration), leaf in zip(table, leaves, strict=True)
            ]
            worth[-1][group] = np.sum([total for total in sums if total is not None], axis=0)
    return worth


def _effects(model: LanguageModel, params: Parameters, batch: Batch, dtype: jax.typing.DTypeLike) -> Parameters:
    """``|w ∂L/∂w|`` of every parameter, of the mean loss of a batch."""

    def loss(params: Parameters, batch: Batch) -> jax.Array:
        return jnp.sum(token_losses(model, params, batch, dtype).losses * batch["weights"])

    gradient = jax.jit(jax.grad(loss))
    total = None
    for part in pieces(batch):
        found = gradient(params, part)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    count = max(float(batch["weights"].sum()), 1.0)
    return jax.tree.map(lambda leaf, slope: jnp.abs(leaf * slope) / count, params, total)


def _by_activation(
    model: LanguageModel,
    params: Parameters,
    batch: Batch,
    groups: Sequence[Sequence[Group]],
    dtype: jax.typing.DTypeLike,
) -> Worth:
    look = Layerwise(model, lambda *given: _look_at_readers(model.spec.width, *given), dtype)
    seen = [jax.tree.map(np.asarray, look.batch(params, part)) for part in pieces(batch)]
    count = max(int((batch["segment_ids"] > 0).sum()), 1)
    worth: list[dict[Group, np.ndarray]] = []
    for number, (declared, layer) in enumerate(zip(layer_declarations(model), groups, strict=True)):
        squares = {name: sum(part[number][name] for part in seen) / count for name in seen[0][number]}
        worth.append({})
        for group in layer:
            if group.reader is None:
                continue
            readers = [name.split(".") for name in squares]
            own = [path for path in readers if _reads(group, path)]
            sums = [group.sums(squares[".".join(path)], _input_axes(below(declared, path)["weight"])) for path in own]
            worth[-1][group] = np.sum(sums, axis=0)
    return worth


def _reads(group: Group, path: Sequence[str]) -> bool:
    """Whether the module at a path is the map that reads a group's units."""
    return path[-1] == group.reader and tuple(path[: len(group.path)]) == group.path


def _input_axes(declared: Any) -> tuple[str, ...]:
    """The logical axes of what a linear map reads, with a leading one of experts where there are many maps."""
    lead = ("experts",) if declared.axes[0] == "experts" else ()
    return (*lead, *(declared.axes[place] for place in declared.matrix[0]))


def _look_at_readers(
    width: int, block: Block, spec: BlockSpec, x: jax.Array, context: Context
) -> tuple[jax.Array, Figures]:
    """Of each map that reads units, the squares of what it reads, summed over tokens: ``[(experts,) *inputs]``."""
    groups = [group for group in groups_of(spec.resolved(width)) if group.reader]
    modules = [path for path, node in nnx.iter_graph(block) if isinstance(node, nnx.Module)]
    paths = [path for path in modules if path and any(_reads(group, path) for group in groups)]
    # A depth rule gives a half other tokens than the block is given; what they are, the half is told.
    halves = {path[0]: (path[0], "inner") for path in paths}
    y, calls = run_listening(block, [*paths, *halves.values()], x, context)
    told = {name: given[0][1] for name, given in zip(halves, calls[len(paths) :], strict=True)}
    found = {}
    for path, given in zip(paths, calls, strict=False):
        module, real = reduce(getattr, path, block), told[path[0]].segment_ids > 0
        found[".".join(path)] = sum(_squares(module, real, *call) for call in given)
    return y, found


def _squares(module: Linear, real: jax.Array, x: jax.Array, groups: Groups | None = None) -> jax.Array:
    """Padding does not count: a router has left it out, and elsewhere `real [batch, time]` says what is none."""
    squares = jnp.square(x.astype(jnp.float32))
    lead = squares.shape[: squares.ndim - len(module.input_shape)]
    if groups is not None:
        count = module.weight.shape[0]
        numbers = groups.spread(jnp.arange(1, count + 1), lead[0])
        return jax.ops.segment_sum(squares, numbers, count + 1)[1:]
    squares = squares * real.reshape(*lead, *[1] * len(module.input_shape))
    return jnp.sum(squares, axis=tuple(range(len(lead))))


def _look_at_stream(block: Block, spec: BlockSpec, x: jax.Array, context: Context) -> tuple[jax.Array, Figures]:
    y = block(x, context)[0]
    a, b = _together(x.astype(jnp.float32)), _together(y.astype(jnp.float32))
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    cosine = jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-12)
    return y, {"change": jnp.sum((1.0 - cosine) * (context.segment_ids > 0))}


def _together(x: jax.Array) -> jax.Array:
    """The values of a token, `[batch, time, values]`, in one stream or in several in front of it."""
    return x if x.ndim == 3 else jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:3], -1)
