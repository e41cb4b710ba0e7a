"""The hidden units of the dense channel mixer divided among experts."""

from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import numpy as np
from pydantic import Field, model_validator

from efficient_lm.errors import ConfigError
from efficient_lm.models.ffns.dense import DenseSpec
from efficient_lm.models.ffns.moe import MoESpec
from efficient_lm.models.layered import sliced
from efficient_lm.models.parameters import Blueprint, Initialization, Parameters
from efficient_lm.spec import Count, Fraction, Positive
from efficient_lm.upcycling.assignment import balanced, most_active, universal
from efficient_lm.upcycling.base import ExpertsSpec
from efficient_lm.upcycling.statistics import Seen


class SplitSpec(ExpertsSpec):
    """Experts carved from a dense channel mixer (Read-ME, Cai et al. 2024, section 3.1).

    With every unit in one expert, all experts chosen and weights of one, the model computes what the dense one did.

    Attributes:
        by: what decides. ``domains``: how active a unit is on each text, one text for each expert; ``clusters``: the
            same with groups of rows of like content; ``contiguous``: units in order; ``random``.
        hidden: units of an expert, the most active ones of its domain, which experts may share, as in Read-ME; null
            puts every unit in one expert, as many in each.
        shared: part of the units that go to a shared expert, which every token runs: those whose activity is highest
            in the domain that uses them least; drawn, or the first, where nothing is measured.
        scale: factor of the routed sum; null takes `top_k` where weights are normalised, so that a chosen expert's is
            one on average, and otherwise `router.scale`.
    """

    kind: Literal["split"] = "split"
    by: Literal["domains", "clusters", "contiguous", "random"] = "clusters"
    hidden: Count | None = None
    shared: Annotated[Fraction, Field(lt=1)] = 0.0
    scale: Positive | None = None

    @model_validator(mode="after")
    def _measures_what_it_needs(self) -> "SplitSpec":
        if not self._measured and (self.hidden is not None or self.rows == "domains"):
            key = "hidden" if self.hidden is not None else "rows"
            raise ConfigError(
                f"method.{key}: {getattr(self, key)} looks at texts: set method.by to domains or clusters"
            )
        return self

    @property
    def _measured(self) -> bool:
        return self.by in ("domains", "clusters")

    @property
    def looks(self) -> bool:
        return self._measured

    @property
    def clusters(self) -> bool:
        return self.by == "clusters"

    @property
    def divides(self) -> bool:
        return True

    def mixture(self, dense: DenseSpec, width: int) -> MoESpec:
        if dense.ternary:
            raise ConfigError("method: ternary weights have one scale for a whole matrix, which cannot be divided")
        if dense.sparsity:
            raise ConfigError(
                f"method: which units stay by ffn.sparsity={dense.sparsity} goes by the mean of all of them, which "
                "cannot be divided; method=copy keeps them together"
            )
        hidden = dense.hidden_size(width)
        common, own = self._sizes(hidden)
        scale = self.scale or (float(self.top_k) if self.router.normalize else self.router.scale)
        return MoESpec(
            experts=self.experts,
            top_k=self.top_k,
            expert=dense.model_copy(update={"hidden": own}),
            shared=dense.model_copy(update={"hidden": common}) if common else None,
            router=self.router.model_copy(update={"scale": scale}),
            balance=self.balance,
        )

    def _sizes(self, hidden: int) -> tuple[int, int]:
        """Units of the shared expert, and of each other. Raises `ConfigError` where they do not come out."""
        routed = hidden - round(self.shared * hidden)
        if self.hidden is not None:
            if self.hidden > routed:
                raise ConfigError(f"method.hidden: {self.hidden} of {routed} units; at most {routed}")
            return hidden - routed, self.hidden
        # What does not divide is shared, if anything is.
        own = routed // self.experts
        if own == 0 or (not self.shared and routed % self.experts):
            valid = [count for count in range(1, routed + 1) if routed % count == 0]
            close = sorted(valid, key=lambda count: abs(count - self.experts))[:3]
            raise ConfigError(
                f"method.experts: {routed} units do not divide among {self.experts}; "
                f"nearest that do: {', '.join(map(str, sorted(close)))}"
            )
        return hidden - own * self.experts, own

    def parts(
        self, dense: DenseSpec, width: int, params: Parameters, seen: Seen | None, key: jax.Array
    ) -> tuple[Sequence[Parameters], Parameters | None]:
        declarations = Blueprint(lambda: dense.build(width, Initialization())).declarations
        common, own = self._units(dense.hidden_size(width), seen, key)
        # The last map's bias is added once: by the shared expert, or in equal parts by those that are chosen.
        shared = sliced(params, declarations, "mlp", common) if len(common) else None
        bias = 0.0 if len(common) else 1.0 / self.top_k
        return [_with_bias(sliced(params, declarations, "mlp", units), bias) for units in own], shared

    def _units(self, hidden: int, seen: Seen | None, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """Of the shared expert ``[units]``, and of the others ``[experts, units]``."""
        count, own = self._sizes(hidden)
        if not self._measured:
            order = np.arange(hidden) if self.by == "contiguous" else np.asarray(jax.random.permutation(key, hidden))
            rest = order[count:].reshape(self.experts, own)
            return np.sort(order[:count]), np.sort(rest, axis=1)
        common = universal(seen.activity, count)
        rest = np.setdiff1d(np.arange(hidden), common)
        activity = seen.activity[:, rest]
        return common, rest[balanced(activity) if self.hidden is None else most_active(activity, own)]


def _with_bias(params: Parameters, factor: float) -> Parameters:
    if "bias" not in params["down"]:
        return params
    return params | {"down": params["down"] | {"bias": factor * params["down"]["bias"]}}
