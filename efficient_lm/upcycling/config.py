"""The configs of the verbs `upcycle`, `merge` and `extract`."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from efficient_lm.config import Name, Parts
from efficient_lm.elastic.budget import BudgetSpec
from efficient_lm.elastic.importance import Order
from efficient_lm.elastic.search.base import SearchSpec
from efficient_lm.errors import ConfigError
from efficient_lm.models.elastic import ElasticSpec
from efficient_lm.spec import Count, Listing, Natural, OneOf, Real, Spec
from efficient_lm.upcycling.base import UpcyclingSpec
from efficient_lm.upcycling.extraction import Importance
from efficient_lm.upcycling.merging import Rows


class Looking(Spec):
    """A verb that looks at a model on text, and writes another.

    Attributes:
        output: the run directory to make.
        text: a file or files; None takes the validation part of what the model was trained on.
        sequence_length: tokens of a row of these; None takes that of training.
        limit: rows that are looked at, at most, of each text.
    """

    output: Name
    text: Name | Annotated[Listing[Name], Field(min_length=1)] | None = None
    sequence_length: Count | None = None
    limit: Count = 64


class UpcycleConfig(Looking):
    """Experts made of dense channel mixers, or mixture of depths around dense layers.

    Attributes:
        checkpoint: a run directory, one of its checkpoints, or a published model.
        method: how.
        seed: of what is drawn.
    """

    checkpoint: Name
    method: OneOf[UpcyclingSpec]
    seed: Natural = 0


class MergeConfig(Spec):
    """Experts of several models in one.

    Attributes:
        checkpoints: the models; all have one backbone.
        output: the run directory to make.
        rows: of routers: ``trained`` or ``domains`` (see `upcycling.merging.merged`); None takes what there is.
        top_k: experts that a token takes; None as in the first.
        bias: added to the score of every expert but the first.
        sequence_length, limit: of the rows of each model's own validation data that ``domains`` looks at.
    """

    checkpoints: Annotated[Listing[Name], Field(min_length=2)]
    output: Name
    rows: Rows | None = None
    top_k: Count | None = None
    bias: Real | None = None
    sequence_length: Count | None = None
    limit: Count = 64

    @model_validator(mode="after")
    def _differ(self) -> "MergeConfig":
        twice = [name for name in self.checkpoints if self.checkpoints.count(name) > 1]
        if twice:
            raise ConfigError(f"checkpoints: '{twice[0]}' is named twice")
        return self


class ExtractConfig(Looking):
    """A model with a part of another.

    Attributes:
        checkpoint: a run directory, one of its checkpoints, or a published model.
        averaged: whether a run's moving average of the parameters is used (`train.average`).
        ffn, heads, state, rank, width: parts of these axes that stay (see `models.elastic.Axis`); None: all.
        layers: a part of them, or the numbers of those that stay.
        experts: a part of them, 0.5; how many of the most important stay in each layer; or which, a list, or a list for
            each layer with experts.
        order: which units, and layers, a part keeps: what is worth most (see `elastic.importance.Order`), or with
            ``none`` the first; None takes the first of what the model is trained for, and else the most active.
        elastic: granularities to choose among, along axes that the model is not trained to be smaller along.
        by: what makes an expert important, where it is said how many.
        uneven: whether layers may keep different numbers, as many on average.
        drop_super_experts: whether Super Experts may be dropped like any other.
        top_k: experts that a token takes from then on; None as before.
        budget: in place of parts, what the submodel may cost at most.
        search: how the best is looked for; None takes the largest. Without a budget its results are all there is.
    """

    checkpoint: Name
    averaged: bool = False
    ffn: Parts | None = None
    heads: Parts | None = None
    state: Parts | None = None
    rank: Parts | None = None
    width: Real | None = None
    layers: Annotated[Listing[Natural], Field(min_length=1)] | Real | None = None
    experts: Count | Real | Listing[Natural] | Listing[Listing[Natural]] | None = None
    order: Order | None = None
    elastic: ElasticSpec | None = None
    by: Importance = "reconstruction"
    uneven: bool = False
    drop_super_experts: bool = False
    top_k: Count | None = None
    budget: BudgetSpec | None = None
    search: OneOf[SearchSpec] | None = None

    @property
    def parts(self) -> dict[str, Any]:
        """By axis, what is said of it."""
        experts = self.experts if isinstance(self.experts, float) else None
        given = {axis: getattr(self, axis) for axis in ("ffn", "heads", "state", "rank", "width", "layers")}
        return {axis: part for axis, part in (given | {"experts": experts}).items() if part is not None}

    @property
    def chooses_parts(self) -> bool:
        """Whether parts are chosen by what they cost and what they are worth."""
        return self.budget is not None or self.search is not None

    @property
    def chooses_experts(self) -> bool:
        """Whether experts stay by what they are worth, or by number."""
        return self.experts is not None and not isinstance(self.experts, float)

    @model_validator(mode="after")
    def _measures(self) -> "ExtractConfig":
        named = [*self.parts, *(["experts"] if self.chooses_experts else [])]
        if self.chooses_parts and named:
            raise ConfigError(f"{named[0]}: a budget or a search says what stays; leave one of them out")
        if not named and not self.chooses_parts:
            raise ConfigError(
                "extract: say what stays: ffn=0.5, heads=0.5, layers=[0,1,3], experts=4, ...; or budget.params=12e6"
            )
        if self.order is not None and not (self.parts or self.chooses_parts):
            raise ConfigError("order: it says which units a part of an axis keeps, such as ffn=0.5; name a part too")
        if self.elastic is not None and not self.chooses_parts:
            raise ConfigError(
                "elastic: a budget or a search chooses among granularities; give budget.params= or search="
            )
        if self.top_k is not None and not self.chooses_experts:
            raise ConfigError("top_k: it goes with experts that are counted or named, such as experts=4")
        self._check_measured()
        return self

    def _check_measured(self) -> None:
        """Whether what says how something is measured is of use. Raises `ConfigError`."""
        if isinstance(self.experts, int):
            return
        orders = self.order != "none" and bool(self.parts or self.elastic or self.order)
        unread = () if orders or self.search is not None else ("text", "sequence_length")
        for name in (*unread, "by", "uneven", "drop_super_experts"):
            if getattr(self, name) != type(self).model_fields[name].default:
                why = "experts are named" if self.chooses_experts else "nothing is measured"
                raise ConfigError(f"{name}: {why}; it is for a number of experts, such as experts=4")
