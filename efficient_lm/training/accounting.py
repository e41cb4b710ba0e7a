"""What a config would cost, counted without allocating it: parameters, FLOPs, memory, cache."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from efficient_lm.config import RunConfig
from efficient_lm.elastic.nested import nested_models
from efficient_lm.elastic.nesting import NoNestingSpec
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import count_parameters, decay_mask, parameter_table
from efficient_lm.objectives.base import Batch
from efficient_lm.training.freezing import for_trained, trainable
from efficient_lm.training.parallelism import Layout
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
    layout.check_batch(train.batch_size, train.accumulate)
    layout.check_experts(config.model)
    schedule = config.schedule.build(config.optimizer.learning_rate, train.steps)
    chosen = trainable(model.declarations, train.only, train.freeze, train.frozen_experts)
    optimizer = for_trained(config.optimizer.build(schedule, decay_mask(model.declarations)), chosen)
    options = {"accumulate": train.accumulate, "clip_norm": train.clip_norm, "dtype": config.precision.dtype}
    step = make_step(model, config.objective, optimizer, **options, chosen=chosen, nesting=config.nesting)
    batch = layout.abstract_batch(train.batch_size, train.sequence_length)
    return step, abstract_state(model, optimizer, layout), batch


def plan(config: RunConfig) -> dict[str, Any]:
    """Count a training run.

    The step is compiled for this machine's devices, and its memory is what the compiler says; no array is made.

    Returns:
        `parameters` by part; `flops_per_token` forward and training; bytes: `parameters`, `gradients`, `optimizer`,
        `activations` (all else that lives during a step: activations, logits, workspace), `cache_per_sequence` for one
        sequence of `train.sequence_length` in the compute dtype.
    """
    model, train = config.model.build(), config.train
    layout = config.parallelism.build()
    step, state, batch = abstract_step(config, model, layout)
    with layout.active(), preferring(train.kernels):
        memory = jax.jit(step, donate_argnums=0).lower(state, batch).compile().memory_analysis()
    shape = batch["tokens"].shape
    parameters, gradients = _bytes(state["parameters"]), _bytes(state["parameters"])
    caches = jax.eval_shape(lambda: model.init_caches(1, train.sequence_length, config.precision.dtype))
    forward = model.flops_per_token(train.sequence_length)
    training = step_flops_per_token(config, model)
    return {
        "parameters": parameters_by_part(model) | {"total": count_parameters(model.declarations)},
        "flops_per_token": {"forward": forward, "training": training},
        "flops_per_step": training * math.prod(shape),
        "training_flops": training * math.prod(shape) * train.steps,
        "tokens": math.prod(shape) * train.steps,
        "bytes": {
            "parameters": parameters,
            "gradients": gradients,
            "optimizer": _bytes(state["optimizer"]),
            "activations": max(memory.temp_size_in_bytes - gradients, 0),
            "cache_per_sequence": _bytes(caches),
        },
    }


def step_flops_per_token(config: RunConfig, model: LanguageModel) -> float:
    """FLOPs for one token of a step, on average where models inside another take turns."""
    length = config.train.sequence_length
    if isinstance(config.nesting, NoNestingSpec):
        return model.training_flops_per_token(length)
    return config.nesting.cost([each.model.training_flops_per_token(length) for each in nested_models(model)])


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
