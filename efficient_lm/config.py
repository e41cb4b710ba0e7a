"""The config of each verb as one spec: composed from YAML, checked, written and read back."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

import efficient_lm.data.dataset  # noqa: F401  (the kind `text` registers itself)
import efficient_lm.data.synthetic  # noqa: F401  (every kind of the folder registers itself)
import efficient_lm.models.skipping  # noqa: F401  (every kind of the folder registers itself)
import efficient_lm.objectives  # noqa: F401  (every kind of the folder registers itself)
from efficient_lm.composition import compose, read_yaml
from efficient_lm.data.base import AnyData
from efficient_lm.data.tokenizers import TokenizerSpec
from efficient_lm.elastic.nesting import NestingSpec, NoNestingSpec
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.evaluation.windows import WindowSpec
from efficient_lm.models.depth.base import DepthSpec
from efficient_lm.models.elastic import MATFORMER
from efficient_lm.models.ffns.base import FFNSpec
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.mixers.base import MixerSpec
from efficient_lm.models.skipping.base import SkippingSpec
from efficient_lm.objectives.base import ObjectiveSpec
from efficient_lm.overrides import PALETTES
from efficient_lm.private import refuse_secrets
from efficient_lm.spec import Count, Fraction, Listing, Natural, OneOf, Positive, Real, Spec, load_plugins
from efficient_lm.training.averaging import AverageSpec
from efficient_lm.training.harm import RollbackSpec
from efficient_lm.training.optimizers import OptimizerSpec
from efficient_lm.training.parallelism import ParallelismSpec
from efficient_lm.training.parameterization import ParameterizationSpec, StandardSpec
from efficient_lm.training.portions import Portions, SizeSchedule
from efficient_lm.training.precision import PrecisionSpec
from efficient_lm.training.probes import ProbesSpec
from efficient_lm.training.profile import StepSpan, span_of
from efficient_lm.training.reporting import write_atomically
from efficient_lm.training.retention import Retention
from efficient_lm.training.schedules import ScheduleSpec
from efficient_lm.training.spikes import SpikeSpec
from efficient_lm.training.trackers import TrackerSpec
from efficient_lm.untrusted import to_yaml
from efficient_lm.validation import validate

load_plugins()

SEQUENCE_LENGTH = 256
"""Tokens per sequence where neither the config nor the data says."""

Name = Annotated[str, Field(min_length=1)]


class RunSpec(Spec):
    """Which run this is.

    Attributes:
        name: for people and trackers.
        dir: its folder.
        seed: of parameters and of the data's order.
    """

    name: Name
    dir: Name
    seed: Natural = 0


class TrainSpec(Spec):
    """How long and in what portions.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences per optimizer step, over all devices.
        batch_schedule: sizes of the batch before `batch_size`: stages, each until a step, or a growth; None: none.
        sequence_length: tokens per sequence; None takes the length of the data's rows, or 256 where the data has none.
        sequence_schedule: lengths before `sequence_length`, likewise; rows are cut into pieces of that length.
        accumulate: micro-batches that a batch is cut into, one after the other.
        clip_norm: bound of the gradient's global norm; None does not clip.
        only: regular expressions of dotted parameter paths; parameters that none is found in are frozen. Empty: none.
        freeze: the same of parameters that are frozen.
        frozen_experts: experts that are frozen in every layer, with their rows of the routers.
        max_nonfinite: steps in a row whose loss or gradient is no number before the run stops.
        rollback: when the run returns to the last good checkpoint and goes on with later batches.
        spike: which steps stand out, and what is done about them.
        log_every, checkpoint_every: steps between.
        evaluate_every: steps between; None evaluates at the end alone.
        evaluate_rows: of the validation data, while training; None takes all. At the end it is always all.
        keep_checkpoints: newest ones kept.
        keep_every: steps; checkpoints at its multiples are kept too. None keeps none for that.
        keep_best: so many of those with the lowest validation loss are kept too, where a save follows an evaluation.
        minutes: of wall time after which this session saves and stops; None has no limit.
        stop_at: step after which this session saves and stops, though the schedule is that of `steps`.
        start_timeout: seconds within which all of many processes have to come.
        peer_timeout: seconds without a sign of life after which another process counts as gone.
        step_timeout: seconds without progress (a step, a batch of an evaluation) after which many processes are stuck.
        stop_at_accuracy: validation accuracy that ends the run, for data with answers; None runs to the end.
        diagnostics: whether each evaluation also measures recurrent states, decay and entropy of attention, by layer
            (see `evaluation.diagnostics`).
        probes: sizes of gradients, parameters, updates and activations by layer; None measures none.
        profile: steps of which a trace is written, ``start:stop`` without the last; None traces none.
        average: a moving average of the parameters that is kept beside them; None keeps none.
        kernels: form of each operator whose block names none: "pallas" takes kernels wherever they honour
            the call, "xla" plain JAX, "auto" what was measured to be fastest (see `kernels_pallas.dispatch`).
    """

    steps: Count
    batch_size: Count = 32
    batch_schedule: SizeSchedule | None = None
    sequence_length: Count | None = None
    sequence_schedule: SizeSchedule | None = None
    accumulate: Count = 1
    clip_norm: Positive | None = 1.0
    only: Listing[Name] = ()
    freeze: Listing[Name] = ()
    frozen_experts: Listing[Natural] = ()
    max_nonfinite: Count = 20
    rollback: RollbackSpec = RollbackSpec()
    spike: SpikeSpec = SpikeSpec()
    log_every: Count = 10
    evaluate_every: Count | None = None
    evaluate_rows: Count | None = None
    checkpoint_every: Count = 200
    keep_checkpoints: Count = 3
    keep_every: Count | None = None
    keep_best: Natural = 0
    minutes: Positive | None = None
    stop_at: Count | None = None
    stop_at_accuracy: Annotated[Fraction, Field(gt=0)] | None = None
    start_timeout: Positive = 300.0
    peer_timeout: Positive = 60.0
    step_timeout: Positive = 1800.0
    diagnostics: bool = False
    probes: ProbesSpec | None = None
    profile: StepSpan | None = None
    average: AverageSpec | None = None
    kernels: Literal["auto", "pallas", "xla"] = "auto"

    @property
    def retention(self) -> Retention:
        """Which checkpoints are kept."""
        return Retention(self.keep_checkpoints, self.keep_every, self.keep_best)

    @model_validator(mode="after")
    def _divides(self) -> "TrainSpec":
        if self.batch_size % self.accumulate:
            divisors = [number for number in range(1, self.batch_size + 1) if self.batch_size % number == 0]
            near = sorted(divisors, key=lambda divisor: abs(divisor - self.accumulate))[:3]
            raise ConfigError(
                f"train.accumulate: {self.accumulate} micro-batches do not divide train.batch_size={self.batch_size}; "
                f"nearest that do: {', '.join(map(str, sorted(near)))}"
            )
        if self.profile is not None and span_of(self.profile).stop > self.steps + 1:
            near = f"{min(span_of(self.profile).start, self.steps)}:{self.steps + 1}"
            raise ConfigError(f"train.profile: '{self.profile}' goes beyond train.steps={self.steps}; nearest: {near}")
        if self.rollback.at_most and self.rollback.after > self.max_nonfinite:
            raise ConfigError(
                f"train.rollback.after: {self.rollback.after} steps are never reached, for the run stops after "
                f"train.max_nonfinite={self.max_nonfinite}; valid: at most that"
            )
        if self.spike.action == "rollback" and not self.rollback.at_most:
            raise ConfigError(
                "train.spike.action: rollback needs train.rollback.at_most, which is 0; say how often, or take skip"
            )
        return self


class RunConfig(Spec):
    """A training run, whole. What `config.yaml` in a run directory holds.

    Attributes:
        parameterization: how starts, learning rates and constant factors follow from the model's width.
        nesting: how the models inside an elastic one (`model.elastic`) are trained.
        init_from: what the parameters begin with: a published model, a run directory or a checkpoint; None draws them.
        init_state: what is taken of it: ``parameters``, or ``all`` that a run had (optimizer, step, place in the data).
    """

    composed_groups: ClassVar[tuple[str, ...]] = (*PALETTES, "experiment")

    model: ModelSpec
    objective: OneOf[ObjectiveSpec]
    nesting: OneOf[NestingSpec] = NoNestingSpec()
    data: AnyData
    tokenizer: OneOf[TokenizerSpec]
    optimizer: OneOf[OptimizerSpec]
    schedule: OneOf[ScheduleSpec]
    parameterization: OneOf[ParameterizationSpec] = StandardSpec()
    precision: PrecisionSpec = PrecisionSpec()
    parallelism: ParallelismSpec = ParallelismSpec()
    tracker: OneOf[TrackerSpec]
    init_from: Name | None = None
    init_state: Literal["parameters", "all"] = "parameters"
    run: RunSpec
    train: TrainSpec

    @model_validator(mode="after")
    def _fits(self) -> "RunConfig":
        self.schedule.spans(self.train.steps)
        if self.init_state == "all" and self.init_from is None:
            raise ConfigError("init_state: all that a run had is taken, but init_from names no run")
        if self.train.stop_at_accuracy is not None and self.data.reads_text:
            raise ConfigError("train.stop_at_accuracy: text has no answers to count; choose a synthetic task, or null")
        if self.train.stop_at_accuracy is not None and self.train.evaluate_every is None:
            raise ConfigError("train.stop_at_accuracy: nothing looks at the accuracy; set train.evaluate_every")
        if self.objective.causal:
            self.model.check_causal(f"objective '{self.objective.kind}' predicts")
        return self._with_elastic_axis()._with_sequence_length()._with_portions()

    def _with_elastic_axis(self) -> "RunConfig":
        """With MatFormer's granularities, where models inside are to be trained and nobody says which."""
        model = self.model
        if model.elastic is None and not isinstance(self.nesting, NoNestingSpec):
            model = model.model_copy(update={"elastic": MATFORMER})
        self.nesting.check(model)
        return self if model is self.model else self.model_copy(update={"model": model})

    def _with_sequence_length(self) -> "RunConfig":
        given, rows = self.train.sequence_length, self.data.row_length
        if None not in (given, rows) and given != rows:
            raise ConfigError(f"train.sequence_length: {given}, but data.length={rows} decides; leave it out")
        train = self.train.model_copy(update={"sequence_length": given or rows or SEQUENCE_LENGTH})
        return self if given is not None else self.model_copy(update={"train": train})

    def _with_portions(self) -> "RunConfig":
        """The same. Raises `ConfigError` where the sizes of a schedule do not fit the run."""
        if self.train.sequence_schedule and self.data.row_length is not None:
            raise ConfigError("train.sequence_schedule: rows of a task are not cut: leave it out, or train on text")
        Portions(self.train)
        return self


class PlanConfig(Spec):
    """What `plan` takes besides a run's config.

    Attributes:
        target: the kind of machine that is planned for; None: what `topology` is of, or this machine.
        topology: "v5p:4x4x4", a number of H200s, "h100:8" or "h200:8x8" (hosts, GPUs of each); None: the smallest of
            the target, or this machine.
        devices: so many virtual CPU devices in place of the machine's; None takes the machine's.
        shardings: whether to list where every parameter lives; None does where there are several devices.
        decode: whether the step that decodes a token is compiled too.
        largest_batch: whether the largest batch that fits is looked for.
        output: a JSON file for the figures.
    """

    target: Literal["cpu", "gpu", "tpu"] | None = None
    topology: Name | Count | None = None
    devices: Count | None = None
    shardings: bool | None = None
    decode: bool = False
    largest_batch: bool = False
    output: Name | None = None

    @model_validator(mode="after")
    def _fits(self) -> "PlanConfig":
        if self.devices is not None and (self.topology is not None or self.target in ("gpu", "tpu")):
            raise ConfigError("devices: counts virtual CPU devices; of accelerators topology says how many: topology=8")
        if self.target == "cpu" and self.topology is not None:
            raise ConfigError("topology: is of accelerators; for several virtual CPU devices give devices=8")
        return self


Parts = Real | Annotated[Listing[Real], Field(min_length=1)] | dict[str, Real]
"""A part of an axis of a model: one, one for each layer that has it, or by block."""

Inside = Real | dict[str, Parts]
"""A smaller model inside another: a part of every axis it is trained to be smaller along, or parts by axis."""


class Skipping(Spec):
    """What uses a model.

    Attributes:
        skipping: which layers each token runs; None runs all.
        submodel: the smaller model inside that is used: a part of every axis the model is trained to be smaller along,
            or parts by axis; None uses the whole.
        averaged: whether a run's moving average of the parameters is used (`train.average`).
    """

    averaged: bool = False
    skipping: OneOf[SkippingSpec] | None = None
    submodel: Inside | None = None


class EvaluateConfig(Skipping):
    """An evaluation.

    Attributes:
        checkpoint: a run directory, one of its checkpoints, or a published model.
        data: whose validation part is read; None takes what the run was trained on.
        text: a file, or files, to read instead.
        sequence_length: tokens per window, or per row of a synthetic task, and of a task also several; None takes the
            data's own, or the one of training.
        stride, begin: how windows follow each other and what stands in front (see `evaluation.windows.WindowSpec`).
        limit: at most so many windows, and so many examples of each task; None takes all.
        batch_size: windows or requests at a time; None takes what suits the device.
        tasks: of lm-eval, by name, YAML file or folder. Without `text` and `data` they alone are run.
        fewshot: worked examples before each question of a task; None takes what the task says.
        diagnostics: whether recurrent states, decay and entropy of attention are measured too, on a few rows of data.
        selection: how depth rules that choose tokens of a row do so: ``top_k`` by comparing them, ``causal`` as when
            decoding, ``both`` one after the other, with how many decisions agree; None as the model says.
        attention_rank: whether the rank of attention maps is measured by layer, on 50 rows of data.
        routing: whether loads, drops and stability of routes, what tokens and domains have to do with experts, and
            Super Experts are measured (see `efficient_lm.evaluation.routing_report`), on `limit` rows or 64; several
            texts are compared as domains.
        output: a JSON file for the results.
    """

    checkpoint: Name
    data: AnyData | None = None
    text: Name | Annotated[Listing[Name], Field(min_length=1)] | None = None
    sequence_length: Count | Annotated[Listing[Count], Field(min_length=1)] | None = None
    stride: Count | None = None
    begin: Literal["document", "none"] = "document"
    limit: Count | None = None
    batch_size: Count | None = None
    tasks: Name | Annotated[Listing[Name], Field(min_length=1)] | None = None
    fewshot: Natural | None = None
    diagnostics: bool = False
    selection: Literal["top_k", "causal", "both"] | None = None
    attention_rank: bool = False
    routing: bool = False
    output: Name | None = None

    @model_validator(mode="after")
    def _fits(self) -> "EvaluateConfig":
        if self.text is not None and self.data is not None:
            raise ConfigError("text: data is given too; leave one of them out")
        for name in ("diagnostics", "attention_rank"):
            if self.text is not None and getattr(self, name):
                raise ConfigError(f"{name}: is of rows of data, and text is windows; use data=files instead of text")
        if self.text is not None and self.selection == "both":
            raise ConfigError("selection: both looks at rows of data, and text is windows; use data=files instead")
        if self.fewshot is not None and self.tasks is None:
            raise ConfigError("fewshot: examples are for tasks, and none is given; add tasks=, or leave it out")
        if isinstance(self.sequence_length, int):
            WindowSpec(sequence_length=self.sequence_length, stride=self.stride, begin=self.begin)
        return self


class GenerateConfig(Skipping):
    """A generation.

    Attributes:
        checkpoint: a run directory, or one of its checkpoints.
        prompt: a text, or several.
        prompt_file: a file with one prompt per line, instead of `prompt`.
        max_new_tokens: per prompt.
        temperature: of the softmax; 0 takes the likeliest token.
        top_k, top_p, min_p: restrict what is sampled; None does not.
        seed: of the sampling.
        stop_at_end: whether the end-of-text token ends a text.
        special_tokens: whether names of special tokens in the prompt, such as ``<|im_start|>``, stand for them.
        draft: the smaller model inside that drafts tokens, as `submodel` says one; or several, smallest first; None
            makes every token with the whole.
        draft_tokens: that are drafted at a time.
        draft_confidence: probability of the likeliest token below which a token is left to the next larger draft.
    """

    checkpoint: Name
    prompt: str | Annotated[Listing[str], Field(min_length=1)] = ""
    prompt_file: Name | None = None
    max_new_tokens: Count = 128
    temperature: Annotated[Real, Field(ge=0)] = 0.8
    top_k: Count | None = None
    top_p: Annotated[Fraction, Field(gt=0)] | None = None
    min_p: Fraction | None = None
    seed: Natural = 0
    stop_at_end: bool = True
    special_tokens: bool = False
    draft: Inside | Annotated[Listing[Inside], Field(min_length=1)] | None = None
    draft_tokens: Count = 4
    draft_confidence: Fraction = 0.5

    @model_validator(mode="after")
    def _fits(self) -> "GenerateConfig":
        if self.prompt_file is not None and self.prompt:
            raise ConfigError("prompt_file: prompt is given too; leave one of them out")
        for name in ("draft_tokens", "draft_confidence"):
            if self.draft is None and getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(f"{name}: nothing is drafted; add draft=0.25, or leave it out")
        return self


class ConvertConfig(Spec):
    """A conversion.

    Attributes:
        source: a Hugging Face folder, a GGUF file, a run directory, or one of its checkpoints.
        output: the folder to make.
        format: ``run`` or ``hf``; None makes a run directory of a published model, and a published model of a run.
        dtype: element type that ``hf`` rounds to; None rounds nothing.
    """

    source: Name
    output: Name
    format: Literal["run", "hf"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


class VerifyConfig(Spec):
    """A verification.

    Attributes:
        run: a run directory to audit; None audits none.
        steps: N of the proof that N steps and N more are the same as 2 N; None proves nothing.
    """

    run: Name | None = None
    steps: Count | None = None


def load_run_config(
    overrides: Sequence[str] = (), config_dirs: Iterable[str | Path] = (), verb: str = "train"
) -> RunConfig:
    """Compose and check the config of a training run. Raises `ConfigError`."""
    values = compose(verb, overrides, config_dirs).values
    refuse_secrets(values)
    config = validate(RunConfig, values)
    if config.run.name in (".", "..") or any(mark in config.run.name for mark in ("/", "\\", "\0", "\n")):
        raise ConfigError(f"run.name: '{config.run.name[:60]}' is no name: without / and \\; run.dir says which folder")
    return config


def save_config(path: str | Path, config: Spec) -> None:
    """Write a config as YAML, whole or not at all."""
    write_atomically(path, to_yaml(config.dump()))


def read_config(path: str | Path) -> RunConfig:
    """The config that `save_config` wrote. Raises `CheckpointError`: it is missing, torn, or of another version."""
    try:
        return validate(RunConfig, read_yaml(path))
    except ConfigError as error:
        text = str(error)
        raise CheckpointError(text if text.startswith(str(path)) else f"{path}: {text}") from error


class Palettes(Spec):
    """The groups that models take by interpolation."""

    mixer: OneOf[MixerSpec]
    ffn: OneOf[FFNSpec]
    depth: OneOf[DepthSpec]


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the YAML files of a training run, for editors.

    A file may hold any part of a config (groups and experiments do), so only the `kind` of a choice is required, and
    any value may be an interpolation ``${...}``. A mapping without `kind` is a partial one, and not checked.
    """
    palettes, run = Palettes.model_json_schema(), RunConfig.model_json_schema()
    definitions = {name: _relaxed(schema) for name, schema in (palettes["$defs"] | run["$defs"]).items()}
    sections = {name: _relaxed(schema) for name, schema in (palettes["properties"] | run["properties"]).items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "efficient-lm training run",
        "type": "object",
        "properties": {"defaults": {"type": "array"}, **{name: _or_interpolation(sections[name]) for name in sections}},
        "additionalProperties": False,
        "$defs": definitions,
    }


def _relaxed(schema: Any) -> Any:
    """The schema with partial mappings and interpolations allowed."""
    if isinstance(schema, list):
        return [_relaxed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    relaxed = {key: _relaxed(value) for key, value in schema.items() if key not in ("required", "properties", "title")}
    if "oneOf" in relaxed:
        relaxed["oneOf"].append({"type": "object", "not": {"required": ["kind"]}})
    if "properties" in schema:
        relaxed["properties"] = {key: _or_interpolation(_relaxed(value)) for key, value in schema["properties"].items()}
        if "kind" in schema["properties"]:
            relaxed["properties"]["kind"] = _relaxed(schema["properties"]["kind"])
            relaxed["required"] = ["kind"]
    return relaxed


def _or_interpolation(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "string", "pattern": r"^\$\{.+\}$"}]}
