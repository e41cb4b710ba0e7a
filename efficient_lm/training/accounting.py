"""What a config would cost, counted without allocating it: parameters, FLOPs, memory, cache."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from efficient_lm.config import RunConfig
from efficient_lm.elastic.nested import nested_models
from efficient_lm.elastic.nesting import NoNestingSpec
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import count_parameters, parameter_table
from efficient_lm.objectives.base import Batch
from efficient_lm.training.freezing import trainable
from efficient_lm.training.parallelism import Layout
from efficient_lm.training.portions import Portions
from efficient_lm.training.step import State, abstract_state, make_step
from kernels_pallas.dispatch import preferring


def parameters_by_part(model: LanguageModel) -> dict[str, int]:
    """Number of values of the embedding, of each half of each kind of block, and of the head."""
    names = model.spec.layer_names()
    counts: Counter[str] = Counter()
    for path, declaration in parameter_table(model.declarations):
        first, *rest = path.split(".")
        if first == "stack":
            segment, place, half = rest[0], rest[1], rest[2]
            start = model.stack.segments[int(segment.removeprefix("segment_"))].start
            first = f"{names[start + int(place.removeprefix('layer_'))]}.{half}"
        counts[first] += declaration.size
    return dict(counts)


def abstract_step(config: RunConfig, model: LanguageModel, layout: Layout) -> tuple[Callable, State, Batch]:
    """The training step of a config, to be jitted with its state donated, and the shapes of its state and batch."""
    train = config.train
    model.check_length(train.sequence_length, "train.sequence_length")
    portions = Portions(train)
    portions.check(layout, train.accumulate)
    layout.check_context(config.model, *(portion.length for portion in portions.portions))
    layout.check_experts(config.model)
    schedule = config.schedule.build(config.optimizer.learning_rate, train.steps)
    chosen = trainable(model.declarations, train.only, train.freeze, train.frozen_experts)
    growths = config.parameterization.growth(model)
    optimizer = config.optimizer.build(schedule, model.declarations, growths=growths, chosen=chosen)
    options = {"accumulate": train.accumulate, "clip_norm": train.clip_norm, "dtype": config.precision.dtype}
    options |= {"chosen": chosen, "nesting": config.nesting, "average": train.average}
    step = make_step(model, config.objective, optimizer, **options)
    batch = layout.abstract_batch(*portions.largest.batch)
    return step, abstract_state(model, optimizer, layout, train.average is not None), batch


class Placement(NamedTuple):
    """Where one parameter, or as many as are stacked, and its optimizer state live.

    Attributes:
        path: dotted.
        shape: of the whole array.
        axes: the logical axes, each with the mesh axis that divides it, if any: ``embed/fsdp``.
        parameter, optimizer: bytes on one device.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    parameter: int
    optimizer: int


def placements(model: LanguageModel, state: State) -> list[Placement]:
    """Of every parameter, from a state with shardings (see `abstract_step`)."""
    found = []
    moments: Counter[str] = Counter()
    for path, leaf in jax.tree.leaves_with_path(state["optimizer"]):
        keys = [step.key for step in path if isinstance(step, jax.tree_util.DictKey)]
        moments[".".join(map(str, keys))] += _on_a_device(leaf)
    arrays = jax.tree.leaves(state["parameters"])
    for (path, declared), leaf in zip(parameter_table(model.declarations), arrays, strict=True):
        spec = (*leaf.sharding.spec, *[None] * leaf.ndim)
        axes = tuple(f"{axis}/{on}" if on else axis for axis, on in zip(declared.axes, spec, strict=False))
        own = sum(size for keys, size in moments.items() if keys == path or keys.endswith(f".{path}"))
        found.append(Placement(path, leaf.shape, axes, _on_a_device(leaf), own))
    return found


def plan(config: RunConfig, devices: list[jax.Device] | None = None) -> dict[str, Any]:
    """Count a training run.

    The step is compiled for `devices` (this machine's, by default), and its memory is what the compiler says; no array
    is made. Bytes are those on one device.

    Returns:
        `parameters` by part; `flops_per_token` forward and training; `mesh`, the size of each of its axes;
        `placements`, a list of `Placement`; bytes: `parameters`, `gradients`, `optimizer`
        (with the average of the parameters, if one is kept),
        `activations` (all else that lives during a step: activations, logits, workspace), `cache_per_sequence` for one
        sequence of `train.sequence_length` in the compute dtype; `programs`, the first step, rows and tokens per row of
        each step that has to be compiled. Of several steps, memory and `flops_per_step` are of the largest.
    """
    model, train = config.model.build(), config.train
    layout = config.parallelism.build(devices)
    step, state, batch = abstract_step(config, model, layout)
    with layout.active(), preferring(train.kernels):
        memory = jax.jit(step, donate_argnums=0).lower(state, batch).compile().memory_analysis()
    shape = batch["tokens"].shape
    parameters = gradients = _bytes(state["parameters"])
    forward = model.flops_per_token(train.sequence_length)
    portions = Portions(train)
    training = run_flops_per_token(config, model)
    return {
        "parameters": parameters_by_part(model) | {"total": count_parameters(model.declarations)},
        "flops_per_token": {"forward": forward, "training": training},
        "flops_per_step": step_flops_per_token(config, model, shape[1]) * math.prod(shape),
        "training_flops": training * portions.tokens(),
        "tokens": portions.tokens(),
        "programs": [(portion.step, *portion.batch) for portion in portions.portions],
        "mesh": dict(layout.mesh.shape),
        "placements": placements(model, state),
        "bytes": {
            "parameters": parameters,
            "gradients": gradients,
            "optimizer": _bytes(state["optimizer"]) + _bytes(state.get("average", {})),
            "activations": max(memory.temp_size_in_bytes - gradients, 0),
            "cache_per_sequence": cache_bytes(model, train.sequence_length, config.precision.dtype),
        },
    }


def cache_bytes(model: LanguageModel, length: int, dtype: jax.typing.DTypeLike) -> int:
    """Bytes of the caches of one sequence of `length` tokens, activations in `dtype`."""
    return _bytes(jax.eval_shape(lambda: model.init_caches(1, length, dtype)))


def run_flops_per_token(config: RunConfig, model: LanguageModel, steps: int | None = None) -> float:
    """FLOPs for one token of the first `steps` steps, on average where rows differ in length; None: of all steps."""
    return Portions(config.train).mean(lambda length: step_flops_per_token(config, model, length), steps)


def step_flops_per_token(config: RunConfig, model: LanguageModel, length: int | None = None) -> float:
    """FLOPs for one token of a step of rows of `length` (None: `train.sequence_length`).

    On average where models inside another take turns.
    """
    length = config.train.sequence_length if length is None else length
    if isinstance(config.nesting, NoNestingSpec):
        return model.training_flops_per_token(length)
    return config.nesting.cost([each.model.training_flops_per_token(length) for each in nested_models(model)])


def _bytes(tree: Any) -> int:
    return sum(map(_on_a_device, jax.tree.leaves(tree)))


def _on_a_device(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array on one device; of all of it where nothing is said of devices."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
