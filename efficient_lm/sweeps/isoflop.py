"""Runs for IsoFLOP profiles: models of several sizes, each trained until it has had a compute budget."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, model_validator

from efficient_lm.errors import ConfigError
from efficient_lm.spec import Count, Listing, Positive, Real, Spec
from efficient_lm.sweeps.budgets import BudgetSpec, Fitted, fit

FLOPS_PER_PRODUCT = 6.0
"""About so many for a parameter and a token, by which the middle size is chosen; the budget itself is counted."""


class IsoflopSpec(Spec):
    """Which sizes are trained with which budgets.

    Attributes:
        flops: budgets of a run's training.
        params: sizes, the same at each budget; None: `sizes` of them at each budget, around the one that sees `ratio`
            tokens per parameter, the largest `spread` times the least.
        sizes, spread, ratio: see `params`.
        embeddings: whether sizes count embeddings and the head's weights.
        aspect: the width is about so many times the layers; None changes the width alone.
        tolerance: by which share sizes and budgets may be off.
    """

    flops: Annotated[Listing[Positive], Field(min_length=1)]
    params: Annotated[Listing[Positive], Field(min_length=1)] | None = None
    sizes: Annotated[Count, Field(ge=3)] = 5
    spread: Annotated[Real, Field(gt=1)] = 8.0
    ratio: Positive = 20.0
    embeddings: bool = True
    aspect: Positive | None = None
    tolerance: Annotated[Real, Field(gt=0, lt=1)] = 0.02

    @model_validator(mode="after")
    def _decides_sizes_once(self) -> "IsoflopSpec":
        for name in ("sizes", "spread", "ratio"):
            if self.params is not None and name in self.model_fields_set:
                raise ConfigError(f"isoflop.{name}: isoflop.params lists the sizes; leave one of them out")
        for name in ("flops", "params"):
            if len(set(getattr(self, name) or ())) != len(getattr(self, name) or ()):
                raise ConfigError(f"isoflop.{name}: lists a number twice")
        return self

    def sizes_at(self, flops: float) -> list[float]:
        """Numbers of parameters of the models that are given a budget, ascending."""
        if self.params is not None:
            return sorted(self.params)
        middle = math.sqrt(flops / (FLOPS_PER_PRODUCT * self.ratio))
        places = [2 * place / (self.sizes - 1) - 1 for place in range(self.sizes)]
        return [middle * self.spread ** (place / 2) for place in places]


def isoflop(values: Mapping[str, Any], spec: IsoflopSpec, name: str = "") -> dict[str, Fitted]:
    """The runs of one architecture: label → what to add to its overrides.

    Each label says budget and size, ``C1e13-N1.3e6``. Columns are those of `Fitted`, and `budget_flops` and
    `budget_params`, what was asked for.

    Args:
        values: the architecture's composed config of `train`, plain.
        name: of the architecture, for messages.

    Raises:
        ConfigError: as `fit`; up to three lines.
    """
    found: dict[str, Fitted] = {}
    faults: list[str] = []
    for flops in sorted(spec.flops):
        for params in spec.sizes_at(flops):
            label = f"C{_short(flops)}-N{_short(params)}"
            budget = BudgetSpec(
                params=params,
                flops=flops,
                embeddings=spec.embeddings,
                aspect=spec.aspect,
                tolerance=spec.tolerance,
            )
            try:
                fitted = fit(values, budget, f"{name}-{label}" if name else label)
            except ConfigError as error:
                faults.append(str(error))
                continue
            columns = {"budget_flops": flops, "budget_params": params, **fitted.columns}
            found[label] = replace(fitted, columns=columns)
    if faults:
        raise ConfigError("\n".join(faults[:3] + ([f"and {len(faults) - 3} more"] if len(faults) > 3 else [])))
    return found


def _short(number: float) -> str:
    """``1.3e6``."""
    figures, power = f"{number:.1e}".split("e")
    return f"{figures.removesuffix('.0')}e{int(power)}"
