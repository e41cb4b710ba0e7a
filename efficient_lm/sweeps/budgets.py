"""Equal budgets: each candidate resized so that all have the same parameters, FLOPs or seconds.

A budget of size (parameters, FLOPs per token, tokens per parameter) decides how large a model is, one of length (FLOPs,
seconds) how long it is trained; one of each can go together. Figures are those of the model that is built, and of the
config that a run gets.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from efficient_lm.config import RunConfig
from efficient_lm.elastic.nested import nested_models
from efficient_lm.errors import ConfigError
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import count_parameters
from efficient_lm.spec import Positive, Real, Spec
from efficient_lm.sweeps.durations import (
    Seconds,
    forward_flops_per_token,
    run_flops,
    run_seconds,
    steps_for,
    with_steps,
)
from efficient_lm.sweeps.resizing import Attempt, Resizer, Target
from efficient_lm.sweeps.sizing import (
    Sizable,
    Size,
    embedding_parameters,
    hidden_sizes,
    with_values,
    with_vocabulary_known,
)  # fmt: skip
from efficient_lm.sweeps.step_seconds import measured_seconds
from efficient_lm.training.accounting import run_flops_per_token
from efficient_lm.training.portions import Portions
from efficient_lm.training.setup import with_factors
from efficient_lm.validation import validate

OF_SIZE, OF_LENGTH = ("params", "flops_per_token", "tokens_per_parameter"), ("flops", "seconds")
MODEL = ("width", "depth", "ffn")
RESIZES = dict.fromkeys(OF_SIZE, MODEL) | {"flops": ("steps", *MODEL), "seconds": ("steps",)}
"""By budget, what can be resized for it; ``auto`` takes the first."""
BARELY = 0.1
"""Below this share a budget is missed for want of sizes in between, and above it for being out of reach."""


class BudgetSpec(Spec):
    """What every arm of a sweep is to have alike: one of the first three, one of the next two, or one of each.

    Attributes:
        params: number of values of the model.
        flops_per_token: of the forward pass, the head included; the mean over a run whose rows differ in length.
        tokens_per_parameter: that a run is trained on; goes with `flops`.
        flops: of all steps, forward and backward.
        seconds: of all steps, as measured on this machine, without compiling, evaluations and checkpoints.
        embeddings: whether parameters are counted with embeddings and the head's weights.
        resize: what changes: ``width``, ``depth`` (repeats of the layout) or ``ffn`` (hidden sizes) of a model,
            ``steps``; ``auto`` is width, or steps for `flops` and `seconds`. After width and depth, hidden sizes make
            up for the rest.
        aspect: instead of width or depth alone both change, the width being about so many times the layers.
        tolerance: by which share an arm may be off.
    """

    params: Positive | None = None
    flops_per_token: Positive | None = None
    tokens_per_parameter: Positive | None = None
    flops: Positive | None = None
    seconds: Positive | None = None
    embeddings: bool = True
    resize: Literal["auto", "width", "depth", "ffn", "steps"] = "auto"
    aspect: Positive | None = None
    tolerance: Annotated[Real, Field(gt=0, lt=1)] = 0.02

    @model_validator(mode="after")
    def _says_one_of_each(self) -> "BudgetSpec":
        if not self.given:
            raise ConfigError(f"budget: say what all arms have alike: {', '.join(RESIZES)}")
        for names in (OF_SIZE, OF_LENGTH):
            both = [name for name in self.given if name in names]
            if len(both) > 1:
                raise ConfigError(f"budget.{both[1]}: decides the same as budget.{both[0]}; leave one of them out")
        if self.tokens_per_parameter is not None and self.flops is None:
            raise ConfigError("budget.tokens_per_parameter: of how many tokens? Give budget.flops too")
        valid = RESIZES[self.given[0]]
        if self.resize not in ("auto", *valid):
            raise ConfigError(
                f"budget.resize: {self.resize} does not decide {self.given[0]}; valid: {', '.join(('auto', *valid))}"
            )
        if not self.embeddings and self.params is None and self.tokens_per_parameter is None:
            raise ConfigError("budget.embeddings: says which parameters count, and the budget is of none; leave it out")
        if self.aspect is not None and (self.of_size is None or self.resize != "auto"):
            raise ConfigError("budget.aspect: changes width and depth of models; leave it out, or budget.resize")
        return self

    @property
    def given(self) -> list[str]:
        """The budgets that there are, those of size first."""
        return [name for name in RESIZES if getattr(self, name) is not None]

    @property
    def of_size(self) -> str | None:
        """The budget that decides how large a model is."""
        first = self.given[0]
        return first if first in OF_SIZE or self.resize in MODEL else None

    @property
    def of_length(self) -> str | None:
        """The budget that decides how long it is trained."""
        last = self.given[-1]
        return last if last != self.of_size else None


@dataclass(frozen=True)
class Fitted:
    """A candidate at its budget.

    Attributes:
        overrides: to be added to those of the candidate.
        columns: for a table: `parameters`, `embedding_parameters`, `width`, `layers`, `hidden` (of its channel mixers;
            least and largest where they differ, None without), `flops_per_token` (of the forward pass), `steps`,
            `tokens` (places for them, padding included), `training_flops`, with a budget of seconds `seconds`, and
            `deviation`, the share by which it is off its budget, of two the worse.
    """

    overrides: list[str]
    columns: dict[str, Any]


def fit(values: Mapping[str, Any], budget: BudgetSpec, name: str = "") -> Fitted:
    """The overrides that give a candidate its budget. Nothing is allocated, and only `seconds` runs anything.

    Args:
        values: the candidate's composed config of `train`, plain.
        name: of the candidate, for messages.

    Raises:
        ConfigError: a config that does not work, or a budget that it cannot meet: how close it comes, and what to
            change.
        DataError: a tokenizer that cannot be read.
    """
    with _named(name):
        candidate = Sizable(values)
        if budget.of_size is not None and candidate.config.init_from is not None:
            raise ConfigError(
                f"init_from: the model's size is that of {candidate.config.init_from}; leave it out, or budget "
                "flops or seconds, which change train.steps"
            )
        changes = candidate.overrides(_resized(candidate, budget))
        config = _checked(with_values(values, changes))
        measured = _measured(config, budget)
        if budget.of_length is not None:
            steps = _steps(config, budget, measured)
            if steps != config.train.steps:
                changes["train.steps"] = steps
                config = _checked(with_values(values, changes))
        return Fitted(
            [f"{key}={_as_text(value)}" for key, value in changes.items()], _columns(config, budget, measured)
        )


def fit_all(candidates: Mapping[str, Mapping[str, Any]], budget: BudgetSpec) -> dict[str, Fitted]:
    """As `fit`, of every candidate by name.

    Raises:
        ConfigError: up to three candidates that cannot meet the budget, one line each.
    """
    found, faults = {}, []
    for name, values in candidates.items():
        try:
            found[name] = fit(values, budget, name)
        except ConfigError as error:
            faults.append(str(error))
    raise_all(faults)
    return found


def raise_all(faults: Sequence[str]) -> None:
    """Raise `ConfigError` with the first three faults, if there are any."""
    if faults:
        more = [f"and {len(faults) - 3} more"] if len(faults) > 3 else []
        raise ConfigError("\n".join([*faults[:3], *more]))


def _resized(candidate: Sizable, budget: BudgetSpec) -> Size:
    """The size that a model is given. Raises `ConfigError` where none is close enough."""
    if budget.of_size is None:
        return candidate.given
    target = Target(lambda model: _cost(candidate.config, model, budget), *_wanted(budget))
    resizer = Resizer(candidate, target)
    if budget.aspect is not None:
        found = resizer.by_shape(budget.aspect)
    else:
        ways = {"auto": resizer.by_width_or_depth, "width": resizer.by_width, "depth": resizer.by_depth}
        found = (ways | {"ffn": resizer.by_hidden})[budget.resize]()
    if found is None or not target.met(found):
        raise ConfigError(_unmet(candidate, budget, target, found))
    return found.size


def _wanted(budget: BudgetSpec) -> tuple[float, float]:
    """What a model is to cost (see `_cost`), and by which share it may be off."""
    if budget.of_size == "tokens_per_parameter":
        # Steps are rounded after that: half of the tolerance is theirs.
        return budget.flops, budget.tolerance / 2
    return getattr(budget, budget.of_size), budget.tolerance


def _cost(config: RunConfig, model: LanguageModel, budget: BudgetSpec) -> float:
    parameters = count_parameters(model.declarations) - (0 if budget.embeddings else embedding_parameters(model))
    if budget.of_size == "params":
        return parameters
    if budget.of_size == "flops":
        return run_flops(config, model)
    if budget.of_size == "tokens_per_parameter":
        return run_flops_per_token(config, model) * budget.tokens_per_parameter * parameters
    return forward_flops_per_token(config, model)


def _unmet(candidate: Sizable, budget: BudgetSpec, target: Target, found: Attempt | None) -> str:
    name = "flops" if budget.of_size == "tokens_per_parameter" else budget.of_size
    wanted = f"budget.{name}: {target.value:,.4g}"
    if found is None:
        return f"{wanted}, but no size near that of the model works; set model.width to one that does"
    model = candidate.model(found.size)
    at = f"model.width={found.size.width}, model.repeats={found.size.repeats}"
    came = f"the closest it comes is {found.cost:,.4g} ({_off(target.deviation(found))}), with {at}"
    outside, embedded = embedding_parameters(model), budget.of_size == "params" and budget.embeddings
    if abs(target.deviation(found)) < BARELY or found.cost < target.value:
        others = "leave out budget.aspect" if budget.aspect else f"try budget.resize={_other(budget.resize)}"
        rest = f"{others}, or raise budget.tolerance"
    elif embedded and 2 * outside > found.cost:
        rest = f"{outside:,} are of embeddings and head: lower model.vocab_size, or set budget.embeddings=false"
    elif budget.resize in ("depth", "ffn"):
        rest = "try budget.resize=width, or raise the budget"
    else:
        rest = "lower model.repeats, or raise the budget"
    return f"{wanted}, but {came}; {rest}"


def _off(deviation: float) -> str:
    return f"{deviation:+.1%}" if abs(deviation) < 1 else f"{1 + deviation:,.3g} times as much"


def _other(resize: str) -> str:
    return " or ".join(way for way in MODEL if way != resize and (resize, way) != ("auto", "width"))


def _measured(config: RunConfig, budget: BudgetSpec) -> Seconds | None:
    """Seconds of a step, by the shape of its batch; None where they do not matter."""
    return measured_seconds(config) if budget.of_length == "seconds" else None


def _steps(config: RunConfig, budget: BudgetSpec, measured: Seconds | None) -> int:
    """How many steps a model is trained for. Raises `ConfigError` where no number of them is close enough."""
    name, value = budget.of_length, getattr(budget, budget.of_length)
    model = config.model.build()
    steps, cost = steps_for(lambda steps: _length_cost(with_steps(config, steps), model, measured), value)
    if abs(cost / value - 1) > budget.tolerance:
        raise ConfigError(
            f"budget.{name}: {value:,.4g}, but the closest it comes is {cost:,.4g} ({_off(cost / value - 1)}), with "
            f"train.steps={steps}; lower train.batch_size (now {config.train.batch_size}), or raise the budget"
        )
    return steps


def _length_cost(config: RunConfig, model: LanguageModel, measured: Seconds | None) -> float:
    return run_flops(config, model) if measured is None else run_seconds(config.train, measured)


def _checked(values: Mapping[str, Any]) -> RunConfig:
    """The config of a run. Raises `ConfigError` for what a run would refuse at its start."""
    config = with_factors(with_vocabulary_known(validate(RunConfig, values)))
    if config.model.elastic is not None:
        nested_models(config.model.build())
    return config


def _columns(config: RunConfig, budget: BudgetSpec, measured: Seconds | None) -> dict[str, Any]:
    model = config.model.build()
    hidden = [size for _, sizes in hidden_sizes(config.model) for size in sizes]
    found = {
        "parameters": count_parameters(model.declarations),
        "embedding_parameters": embedding_parameters(model),
        "width": config.model.width,
        "layers": len(model.layers),
        "hidden": None if not hidden else hidden[0] if len(set(hidden)) == 1 else f"{min(hidden)} to {max(hidden)}",
        "flops_per_token": forward_flops_per_token(config, model),
        "steps": config.train.steps,
        "tokens": Portions(config.train).tokens(),
        "training_flops": run_flops(config, model),
    }
    found |= {} if measured is None else {"seconds": run_seconds(config.train, measured)}
    counted = found["parameters"] - (0 if budget.embeddings else found["embedding_parameters"])
    costs = {
        "params": counted,
        "flops_per_token": found["flops_per_token"],
        "tokens_per_parameter": found["tokens"] / counted,
        "flops": found["training_flops"],
        "seconds": found.get("seconds"),
    }
    off = {name: costs[name] / getattr(budget, name) - 1 for name in budget.given}
    worst = max(off, key=lambda name: abs(off[name]))
    if abs(off[worst]) > budget.tolerance:
        raise ConfigError(f"budget.{worst}: {_off(off[worst])} is the closest it comes; lower train.batch_size")
    return found | {"deviation": off[worst]}


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Faults of config begin with the name of the arm."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}" if name else str(error)) from error


def _as_text(value: Any) -> str:
    """A number, a list or a mapping as an override has it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_as_text(inner)}" for key, inner in value.items()) + "}"
    return str(value).replace(" ", "")
