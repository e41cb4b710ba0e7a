"""A question and how it is put: what `configs/evidence/NAME.yaml` says."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

import efficient_lm.evidence.measures  # noqa: F401  (registers the kinds)
from efficient_lm.composition import builtin_configs, read_yaml
from efficient_lm.errors import ConfigError, nearest
from efficient_lm.evidence.measures.answers import AnswersSpec
from efficient_lm.evidence.measures.base import MeasureSpec
from efficient_lm.overrides import parse
from efficient_lm.spec import Listing, Natural, OneOf, Positive, Real, Spec
from efficient_lm.validation import validate

Arms = Annotated[dict[str, Listing[str]], Field(min_length=1)]


class Expectation(Spec):
    """What the mean of a figure should be, over seeds.

    Attributes:
        arm: whose.
        figure: its name, as the page has it.
        over: an arm; its figure of the same seed divides this one.
        minus: an arm; its figure of the same seed is taken from this one.
    """

    arm: str
    figure: str
    over: str | None = None
    minus: str | None = None
    at_least: Real | None = None
    at_most: Real | None = None

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that it names."""
        return tuple(arm for arm in (self.arm, self.over, self.minus) if arm is not None)

    @model_validator(mode="after")
    def _one_comparison(self) -> "Expectation":
        if self.over is not None and self.minus is not None:
            raise ConfigError("over, minus: one of the two")
        return self


class EvidenceSpec(Spec):
    """A question and how it is put.

    Attributes:
        question: in a sentence or two, for the page.
        overrides: of the command line, for every run.
        arms: name → what makes it different.
        grid: key → values; every arm is measured at every point.
        learning_rates: tried with the first seed; the best one is kept for the others. Empty leaves what the overrides
            say.
        seeds: of parameters and rows.
        measure: what is measured of every run.
        expect: what the page says has come true or not.
        only: arms to measure; empty takes all.
        runs: folder of the runs.
        output: folder of the page; None takes `docs/results`, or the runs' folder when the command line changed
            anything.
    """

    question: str
    overrides: Listing[str] = ()
    arms: Arms
    grid: dict[str, Listing[Any]] = {}
    learning_rates: Listing[Positive] = ()
    seeds: Annotated[Listing[Natural], Field(min_length=1)] = (0,)
    measure: OneOf[MeasureSpec] = AnswersSpec()
    expect: Listing[Expectation] = ()
    only: Listing[str] = ()
    runs: str = "runs/evidence"
    output: str | None = None

    @model_validator(mode="after")
    def _names(self) -> "EvidenceSpec":
        read = () if self.measure.reads is None else (self.measure.reads,)
        for name in (*self.only, *read, *(arm for expected in self.expect for arm in expected.arms)):
            if name not in self.arms:
                raise ConfigError(f"only, measure, expect: no arm is named '{name}'; {nearest(name, self.arms)}")
        for name in read:
            if self.only and name not in self.only:
                raise ConfigError(f"only: the other arms are measured beside '{name}'; name it too")
        return self

    @property
    def measured(self) -> list[str]:
        """The arms to measure, first the one that others are measured beside."""
        arms = [arm for arm in self.arms if not self.only or arm in self.only]
        return sorted(arms, key=lambda arm: arm != self.measure.reads)

    def points(self) -> Iterator[dict[str, Any]]:
        """Every point of the grid: key → value."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


def read_evidence(name: str, arguments: Sequence[str] = ()) -> EvidenceSpec:
    """`configs/evidence/NAME.yaml`, with values of its own set by ``key=value``; other keys go to every run.

    Raises:
        ConfigError: no such evidence, or values that it cannot have.
    """
    folder = builtin_configs() / "evidence"
    names = [file.stem for file in folder.glob("*.yaml")]
    if name not in names:
        raise ConfigError(f"{name}: no such evidence; {nearest(name, names)}")
    values = read_yaml(folder / f"{name}.yaml")
    for text in arguments:
        override = parse(text)
        key, *inner = override.key_or_group.split(".")
        if key not in EvidenceSpec.keys():
            values["overrides"] = [*values.get("overrides", ()), text]
        elif inner:
            before = values.get(key)
            values[key] = {**(before if isinstance(before, dict) else {}), ".".join(inner): override.value()}
        else:
            values[key] = override.value()
    if arguments and values.get("output") is None:
        values["output"] = values.get("runs", EvidenceSpec.model_fields["runs"].default)
    return validate(EvidenceSpec, values, name)
