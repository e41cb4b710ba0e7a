"""The contract of a way from a dense model to a conditional one, and what those share that make mixtures of experts."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator

from efficient_lm.errors import ConfigError
from efficient_lm.models.ffns.dense import DenseSpec
from efficient_lm.models.ffns.experts.balance import BalanceSpec
from efficient_lm.models.ffns.experts.router import RouterSpec
from efficient_lm.models.ffns.moe import MoESpec
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters
from efficient_lm.spec import Choice, Count, Listing, Natural, PerLayer, Real
from efficient_lm.upcycling.statistics import Seen


class UpcyclingSpec(Choice, role="upcycling"):
    """A way from a dense model to one whose tokens do not run all of it. One file per kind in this folder.

    Attributes:
        layers: the layers that change, from 0; null leaves it to the method.
    """

    layers: Annotated[Listing[Natural], Field(min_length=1)] | None = None


class ExpertsSpec(UpcyclingSpec):
    """A way from dense channel mixers to mixtures of experts.

    Attributes:
        experts: of each layer that becomes a mixture.
        top_k: experts that a token runs.
        layers: the layers that become mixtures, from 0; null takes every dense one, or of each `every` layers the last.
        every: see `layers`.
        rows: how routers begin. ``random``: normal, with standard deviation `router_std`. ``domains``: the row of an
            expert is the mean of what its domain's tokens show the router, each and the mean normalised (FlexOlmo, Shi
            et al. 2025, section 3). Null takes the latter where the method looks at texts for other reasons.
        router, balance: as in the ffn `moe`.
        pregate: one router in front of the layers in place of theirs, as `model.pregate` without its `experts`.
    """

    experts: PerLayer[Count] = 8
    top_k: Count = 2
    every: Count = 1
    rows: Literal["random", "domains"] | None = None
    router_std: Annotated[Real, Field(ge=0)] = 0.02
    router: RouterSpec = RouterSpec(normalize=True)
    balance: BalanceSpec = BalanceSpec()
    pregate: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ExpertsSpec":
        if self.layers is not None and self.every != 1:
            raise ConfigError("method.every: method.layers says which layers; leave one of them out")
        if self.pregate is not None and self.rows == "domains":
            raise ConfigError("method.rows: with method.pregate layers have no rows of their own; leave it out")
        if isinstance(self.experts, int) and self.top_k > self.experts:
            raise ConfigError(f"method.top_k: {self.top_k} of {self.experts} experts; at most {self.experts}")
        return self

    @property
    def looks(self) -> bool:
        """Whether it looks at what channel mixers do on texts."""
        return self.rows == "domains"

    @property
    def clusters(self) -> bool:
        """Whether domains are clusters of rows; otherwise each text is one."""
        return False

    @property
    def divides(self) -> bool:
        """Whether an expert has some of the hidden units, so that its first are not the first of all."""
        return False

    def chosen(self, model: LanguageModel) -> list[int]:
        """The layers that become mixtures. Raises `ConfigError` for one that cannot."""
        dense = [number for number, layer in enumerate(model.layers) if isinstance(layer.ffn, DenseSpec)]
        if not dense:
            raise ConfigError("checkpoint: no layer has a dense ffn to make experts of")
        if self.layers is None:
            found = [number for number in dense if (number + 1) % self.every == 0]
            if not found:
                raise ConfigError(
                    f"method.every: none of the {len(model.layers)} layers is the last of {self.every}; "
                    f"at most {max(dense) + 1}"
                )
            return found
        for number in self.layers:
            if number not in dense:
                there = f"layer {number} has no dense ffn" if number < len(model.layers) else f"there is no {number}"
                raise ConfigError(f"method.layers: {there}; valid: {', '.join(map(str, dense))}")
        return sorted(set(self.layers))

    def mixture(self, dense: DenseSpec, width: int) -> MoESpec:
        """The mixture that takes the place of a channel mixer; the method's values are those of one layer."""
        raise TypeError(f"{type(self).__name__} does not define mixture")

    def parts(
        self, dense: DenseSpec, width: int, params: Parameters, seen: Seen | None, key: jax.Array
    ) -> tuple[Sequence[Parameters], Parameters | None]:
        """Parameters of each expert, and of the shared one, from those of a channel mixer."""
        raise TypeError(f"{type(self).__name__} does not define parts")

    def router_rows(self, mixture: MoESpec, width: int, seen: Seen | None, key: jax.Array) -> jax.Array | None:
        """How a layer's router begins, float32 ``[width, experts]``; None where it has no rows of its own."""
        if self.pregate is not None:
            return None
        if seen is not None and self.rows != "random":
            return jnp.asarray(seen.inputs.T)
        return self.router_std * jax.random.normal(key, (width, mixture.experts), jnp.float32)
