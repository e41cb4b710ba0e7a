"""What a config would cost, counted without allocating it: parameters, FLOPs, memory, cache."""

import math
from collections import Counter
from typing import Any, NamedTuple

import jax

from efficient_lm.config import RunConfig
from efficient_lm.elastic.nested import nested_models
from efficient_lm.elastic.nesting import NoNestingSpec
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import count_parameters, parameter_table
from efficient_lm.training.compiling import compiled_decode, compiled_step, defined_for
from efficient_lm.training.machines import Machine, here
from efficient_lm.training.portions import Portions
from efficient_lm.training.roofline import estimate
from efficient_lm.training.step import State
from kernels_pallas.ahead import TooLarge
from kernels_pallas.ahead.collectives import totals


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
    """Of every parameter, from a state with shardings (see `Definition.abstract_state`)."""
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


def plan(config: RunConfig, machine: Machine | None = None, decode: bool = False) -> dict[str, Any]:
    """Count a training run.

    The step is compiled for a machine (this one, by default), and its memory is what the compiler says; no array is
    made. Bytes are those on one device.

    Args:
        config: with its `model.vocab_size` known.
        decode: whether the step that decodes one sequence is compiled too.

    Returns:
        `parameters` by part; `flops_per_token` forward and training; `flops_per_step`, of all `devices`; `mesh`, the
        size of each of its axes; `placements`, a list of `Placement`; bytes: `parameters`, `gradients`, `optimizer`
        (with the average of the parameters, if one is kept), `activations` (all else that lives during a step: batch,
        activations, logits, workspace), `peak`, which is their sum, and `cache_per_sequence` for one sequence of
        `train.sequence_length` in the compute dtype; `collectives` by kind (see `ahead.collectives.totals`); `time`
        (see `Estimate.dump`), None where nothing is known of the machine or the compiler refuses the step; `programs`,
        the first step, rows and tokens per row of each step that has to be compiled; with `decode` what `_decoding`
        returns. Of several steps, memory, time and `flops_per_step` are of the largest.
    """
    machine = here() if machine is None else machine
    defined = defined_for(config, machine)
    config, model, portions = defined.config, defined.model, defined.portions
    rows, length = portions.largest.batch
    step = step_flops_per_token(config, model, length) * rows * length
    try:
        program = compiled_step(defined, machine)
        peak, exchanged = program.peak_bytes, totals(program.collectives)
        timed = estimate(program, machine, config.precision.compute, step, rows * length)
    except TooLarge as error:
        peak, exchanged, timed = error.needed, {}, None
    state = defined.abstract_state()
    training, length = run_flops_per_token(config, model), config.train.sequence_length
    cached = cache_bytes(model, length, config.precision.dtype)
    return {
        "parameters": parameters_by_part(model) | {"total": count_parameters(model.declarations)},
        "flops_per_token": {
            "forward": model.flops_per_token(length),
            "training": training,
        },
        "flops_per_step": step,
        "training_flops": training * portions.tokens(),
        "tokens": portions.tokens(),
        "programs": [(portion.step, *portion.batch) for portion in portions.portions],
        "devices": len(machine.devices),
        "mesh": dict(defined.layout.mesh.shape),
        "placements": placements(model, state),
        "bytes": _parts(state, peak) | {"cache_per_sequence": cached},
        "collectives": exchanged,
        "time": timed and timed.dump(),
    } | ({"decode": _decoding(config, model, machine)} if decode else {})


def _parts(state: State, peak: int) -> dict[str, int]:
    """What the bytes of a step's peak are: the compiler says only how many."""
    parameters = device_bytes(state["parameters"])
    optimizer = device_bytes(state["optimizer"]) + device_bytes(state.get("average", {}))
    gradients = max(min(parameters, peak - parameters - optimizer), 0)
    activations = max(peak - parameters - optimizer - gradients, 0)
    return {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations,
        "peak": peak,
    }


def _decoding(config: RunConfig, model: LanguageModel, machine: Machine) -> dict[str, Any]:
    """Of a token of one sequence of `train.sequence_length`: bytes of one device, `parameters` (float32), `cache`,
    `peak`; `time`, None where nothing is known of the machine or the compiler refuses.

    Raises:
        ConfigError: the model does not decode.
    """
    length, alone = config.train.sequence_length, machine.alone()
    sizes = {
        "parameters": 4 * count_parameters(model.declarations),
        "cache": cache_bytes(model, length, config.precision.dtype),
    }
    try:
        program = compiled_decode(config, model, machine)
    except TooLarge as error:
        return {"bytes": sizes | {"peak": error.needed}, "time": None}
    timed = estimate(program, alone, config.precision.compute, program.flops, 1)
    return {"bytes": sizes | {"peak": program.peak_bytes}, "time": timed and timed.dump()}


def cache_bytes(model: LanguageModel, length: int, dtype: jax.typing.DTypeLike) -> int:
    """Bytes of the caches of one sequence of `length` tokens, activations in `dtype`."""
    return device_bytes(jax.eval_shape(lambda: model.init_caches(1, length, dtype)))


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


def device_bytes(tree: Any) -> int:
    """Of arrays, those on one device."""
    return sum(map(_on_a_device, jax.tree.leaves(tree)))


def _on_a_device(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array on one device; of all of it where nothing is said of devices."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
