"""What a sweep is asked to do: `configs/sweep.yaml`, a sweep file and a command line as one spec. Imports no jax."""

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

import efficient_lm.sweeps.launchers  # noqa: F401  (every kind of the folder registers itself)
from efficient_lm.composition import ConfigRoots, compose
from efficient_lm.errors import ConfigError
from efficient_lm.overrides import parse
from efficient_lm.spec import Count, Listing, Natural, OneOf, Spec
from efficient_lm.sweeps.axes import Axis, axis_of_override, axis_of_values, zipped
from efficient_lm.sweeps.launchers.base import LauncherSpec
from efficient_lm.sweeps.launchers.local import LocalLauncherSpec
from efficient_lm.sweeps.searches import GridSearchSpec, Objective, SearchSpec
from efficient_lm.validation import validate

ROOT = "sweep"
BUDGET = "budget."
OWN_FOLDER = ("run.name", "run.dir")
MAY_CHANGE = ("name", "dir", "launcher", "restarts", "retry_failed", "dry_run")
"""Keys that do not make another sweep of it."""

Name = Annotated[str, Field(min_length=1, pattern=r"^[^/\\\n\x00]+$")]


class When(Spec):
    """What holds for some arms alone.

    Attributes:
        condition: written ``if``: axis → a value, or several; arms that have these.
        axes: further axes of such arms.
        base: further overrides of such arms.
    """

    condition: Annotated[dict[str, Any], Field(alias="if", min_length=1)]
    axes: dict[str, Any] = {}
    base: Listing[str] = ()


class SweepConfig(Spec):
    """A sweep.

    Attributes:
        name: of the sweep; None: made of the names of its axes.
        dir: its folder; None: `runs/sweeps/NAME`.
        base: overrides of every run.
        axes: key → values; every combination is an arm. Values are a list, a text as Hydra has it (``range(1,5)``), or
            names, each with the overrides that it stands for.
        zip: keys whose values move together, as one axis; several such axes as a list.
        when: axes and overrides for arms with given values of others.
        exclude: arms that are left out: axis → a value, or several.
        seeds: of every arm, or how many (from 0); None leaves the seed to the config of the run.
        metric: what the table is sorted by, and what a search looks at unless it has objectives.
        search: which arms are tried.
        budget: what all arms are made to have alike (see `sweeps.budgets`); None leaves them as they are.
        launcher: where runs are started.
        restarts: how often in a row a run that was killed is started again without having saved a step in between.
        retry_failed: whether runs that failed are tried once more.
        dry_run: whether only the table is printed.
    """

    name: Name | None = None
    dir: Annotated[str, Field(min_length=1)] | None = None
    base: Listing[str] = ()
    axes: dict[str, Any] = {}
    zip: Listing[dict[str, Any]] = ()
    when: Listing[When] = ()
    exclude: Listing[dict[str, Any]] = ()
    seeds: Count | Annotated[Listing[Natural], Field(min_length=1)] | None = None
    metric: Objective = Objective(name="val_loss")
    search: OneOf[SearchSpec] = GridSearchSpec()
    budget: dict[str, Any] | None = None
    launcher: OneOf[LauncherSpec] = LocalLauncherSpec()
    restarts: Natural = 3
    retry_failed: bool = False
    dry_run: bool = False

    @model_validator(mode="before")
    @classmethod
    def _one_zip(cls, value: Any) -> Any:
        given = value.get("zip", ())
        return value | {"zip": [given] if isinstance(given, dict) else given or ()}

    @model_validator(mode="after")
    def _seeds_differ(self) -> "SweepConfig":
        if isinstance(self.seeds, tuple) and len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds: {', '.join(map(str, self.seeds))}: one comes twice")
        return self

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What decides."""
        return self.search.objectives or (self.metric,)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this sweep from others: its plain values, but those that may change while it is run."""
        values = {key: value for key, value in self.dump().items() if key not in MAY_CHANGE}
        return {**values, "search": {key: value for key, value in values["search"].items() if key != "trials"}}


def read_sweep(overrides: Sequence[str], config_dirs: Sequence[str]) -> tuple[SweepConfig, list[Axis]]:
    """The sweep that a command line asks for, and its axes without those of `when`.

    A key of the sweep (`SweepConfig`) sets it; any other key is of the runs: an axis with several values, with
    one part of the base. Both go before what the sweep file says of the key.

    Raises:
        ConfigError: bad syntax, an unknown choice, an axis twice, an empty choice, nothing that differs.
    """
    roots = ConfigRoots.of(config_dirs)
    keys = {*SweepConfig.keys(), ROOT}
    own = [text for text in overrides if _top(text) in keys and not _is_axis(text)]
    values = compose(ROOT, [_by_kind(text) for text in own], config_dirs).values
    said = {text.partition("=")[0] for text in own}
    values["axes"] = {key: given for key, given in (values["axes"] or {}).items() if key not in said}
    config = _with_runs(validate(SweepConfig, values), [text for text in overrides if text not in own], roots)
    axes = [axis_of_values(key, given, roots) for key, given in config.axes.items()]
    axes += [zipped(group, roots) for group in config.zip]
    _check_keys(config, axes)
    name = config.name or re.sub(r"[^\w.+-]+", "_", "-".join(axis.name for axis in axes)) or "seeds"
    config = config.model_copy(update={"name": name, "dir": config.dir or f"runs/sweeps/{name}"})
    return config, axes


def _top(text: str) -> str:
    return re.split(r"[.=@]", text.lstrip("+~"), maxsplit=1)[0]


def _is_axis(text: str) -> bool:
    """Whether arms differ in a key of the sweep: ``budget.flops=1e13,3e13``."""
    return text.startswith(BUDGET) and parse(text, several=True).is_sweep_override()


def _by_kind(text: str) -> str:
    """``search=tpe`` as the mapping that it stands for."""
    found = re.fullmatch(r"(search|search\.pruner)=([a-z]\w*)", text)
    return f"{found[1]}={{kind: {found[2]}}}" if found else text


def _with_runs(config: SweepConfig, overrides: Sequence[str], roots: ConfigRoots) -> SweepConfig:
    """With what the command line says of runs."""
    base, axes, seeds = list(config.base), dict(config.axes), config.seeds
    fixed = {key for group in config.zip for key in group} | {key for when in config.when for key in when.axes}
    for text in overrides:
        override = parse(text, several=True)
        key, several = override.key_or_group, override.is_sweep_override()
        if key in fixed:
            raise ConfigError(f"{text}: {key} is an axis of zip or when; change it there")
        if key == "run.seed":
            found = axis_of_override(text, roots).values if several else None
            seeds = [value.label for value in found] if found is not None else [override.value()]
        elif several:
            axis_of_override(text, roots)
            axes[key] = text.partition("=")[2]
        else:
            axes.pop(key, None)
            base.append(text)
    if "run.seed" in axes:
        raise ConfigError("axes.run.seed: is no axis, for figures are averaged over seeds; write seeds")
    return validate(SweepConfig, {**config.dump(), "base": base, "axes": axes, "seeds": seeds})


def _check_keys(config: SweepConfig, axes: Sequence[Axis]) -> None:
    """Raises `ConfigError` for a key on two axes, keys that the sweep sets itself, and where nothing differs."""
    keys = [key.lstrip("+") for axis in axes for key in axis.keys]
    given = [*config.base, *(text for when in config.when for text in when.base)]
    for key in [
        *keys,
        *(parse(text).key_or_group for text in given),
        *(key for when in config.when for key in when.axes),
    ]:
        if key in OWN_FOLDER:
            raise ConfigError(f"{key}: each run has a folder and a name of its own; dir= and name= are the sweep's")
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice}: is on two axes")
    if not axes and config.seeds is None and not config.when:
        raise ConfigError("sweep: nothing differs: give a key several values, as mixer=attention,gla, or choose sweep=")
