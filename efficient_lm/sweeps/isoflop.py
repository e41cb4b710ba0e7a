"""Runs for IsoFLOP profiles: models of several sizes, each trained until it has had a compute budget."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from efficient_lm.errors import ConfigError
from efficient_lm.spec import Listing, Positive, Real, Spec
from efficient_lm.sweeps.budgets import BudgetSpec, Fitted, fit, raise_all


class IsoflopSpec(Spec):
    """Which sizes are trained with which budgets: every size with every budget.

    Attributes:
        flops: budgets of a run's training.
        params: sizes, the same at each budget.
        tokens_per_parameter: instead of these; the larger a budget, the larger are then its models.
        embeddings, resize, aspect, tolerance: as of `BudgetSpec`.
    """

    flops: Annotated[Listing[Positive], Field(min_length=1)]
    params: Annotated[Listing[Positive], Field(min_length=1)] | None = None
    tokens_per_parameter: Annotated[Listing[Positive], Field(min_length=1)] | None = None
    embeddings: bool = True
    resize: Literal["auto", "width", "depth", "ffn"] = "auto"
    aspect: Positive | None = None
    tolerance: Annotated[Real, Field(gt=0, lt=1)] = 0.02

    @model_validator(mode="after")
    def _says_sizes_once(self) -> "IsoflopSpec":
        if (self.params is None) == (self.tokens_per_parameter is None):
            raise ConfigError("isoflop: say how large models are, by params or by tokens_per_parameter")
        for name in ("flops", self.sized_by):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ConfigError(f"isoflop.{name}: lists a number twice")
        return self

    @property
    def sized_by(self) -> str:
        """The key that says how large models are."""
        return "tokens_per_parameter" if self.params is None else "params"

    def budgets(self) -> dict[str, BudgetSpec]:
        """The budget of each run, under a label that says it: ``C1e13-N1.3e6``, or ``C1e13-D20N``."""
        rest = {name: getattr(self, name) for name in ("embeddings", "resize", "aspect", "tolerance")}
        return {
            f"C{_short(flops)}-{_size(self.sized_by, size)}": BudgetSpec(flops=flops, **{self.sized_by: size}, **rest)
            for flops in sorted(self.flops)
            for size in sorted(getattr(self, self.sized_by))
        }


def isoflop(values: Mapping[str, Any], spec: IsoflopSpec, name: str = "") -> dict[str, Fitted]:
    """The runs of one architecture: label → what to add to its overrides.

    Columns are those of `Fitted`, and `budget_flops`, what was asked for.

    Args:
        values: the architecture's composed config of `train`, plain.
        name: of the architecture, for messages.

    Raises:
        ConfigError: as `fit`; up to three lines.
    """
    found: dict[str, Fitted] = {}
    faults: list[str] = []
    for label, budget in spec.budgets().items():
        try:
            fitted = fit(values, budget, f"{name}-{label}" if name else label)
        except ConfigError as error:
            faults.append(str(error))
            continue
        found[label] = replace(fitted, columns={"budget_flops": budget.flops, **fitted.columns})
    raise_all(faults)
    return found


def _size(name: str, size: float) -> str:
    return f"N{_short(size)}" if name == "params" else f"D{size:g}N"


def _short(number: float) -> str:
    """``1.3e6``."""
    figures, power = f"{number:.3e}".split("e")
    return f"{float(figures):g}e{int(power)}"
