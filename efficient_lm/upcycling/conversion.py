"""A dense model with mixtures of experts in place of its channel mixers."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efficient_lm.models.elastic import without_axis
from efficient_lm.models.language_model import LanguageModel, ModelSpec
from efficient_lm.models.layered import layer_parameters, spec_of_layers, with_layers
from efficient_lm.models.parameters import Blueprint, Initialization, Parameters
from efficient_lm.upcycling.base import ExpertsSpec
from efficient_lm.upcycling.statistics import Domains, domains_seen


def upcycled(
    model: LanguageModel,
    params: Parameters,
    method: ExpertsSpec,
    key: jax.Array,
    domains: Domains | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[ModelSpec, Parameters]:
    """A model with mixtures of experts in place of dense channel mixers, and its parameters.

    Args:
        key: of what is drawn: routers, noise.
        domains: rows of text, for a method that `looks`.
        dtype: of the computation that looks at them.

    Raises:
        ConfigError: no dense channel mixer, a layer there is not, values that do not fit it.
    """
    spec = upcycled_spec(model, method)
    seen = domains_seen(model, params, domains, dtype) if domains is not None else [None] * len(model.layers)
    chosen, values, new = method.chosen(model), layer_parameters(model, params), spec.build()
    for place, number in enumerate(chosen):
        own, mixture = method.at(place, len(chosen)), new.layers[number].ffn
        here, dense = jax.random.fold_in(key, number), model.layers[number].ffn
        inner = values[number]["ffn"]["inner"]
        experts, shared = own.parts(dense, spec.width, inner, seen[number], jax.random.fold_in(here, 0))
        given = {"experts": stacked(experts)} | ({} if shared is None else {"shared": shared})
        rows = own.router_rows(mixture, spec.width, seen[number], jax.random.fold_in(here, 1))
        given |= {} if rows is None else {"router": {"weight": rows}}
        blueprint = Blueprint(lambda mixture=mixture: mixture.build(spec.width, Initialization(spec.init_std)))
        inner = filled(blueprint.init(jax.random.fold_in(here, 2)), given)
        values[number] = values[number] | {"ffn": values[number]["ffn"] | {"inner": inner}}
    outer = {**params}
    if new.pregate is not None:
        outer["pregate"] = new.pregate.init(jax.random.fold_in(key, len(values)))
    return spec, with_layers(new, outer, values)


def upcycled_spec(model: LanguageModel, method: ExpertsSpec) -> ModelSpec:
    """The architecture that a method makes; no parameter is read. Raises `ConfigError`."""
    chosen, layers = method.chosen(model), list(model.layers)
    for place, number in enumerate(chosen):
        own = method.at(place, len(chosen))
        mixture = own.mixture(layers[number].ffn, model.spec.width)
        if method.pregate is not None:
            mixture = mixture.model_copy(update={"router": mixture.router.model_copy(update={"pregated": True})})
        layers[number] = layers[number].model_copy(update={"ffn": mixture})
    changes: dict[str, Any] = {}
    if method.pregate is not None:
        changes["pregate"] = {"experts": layers[chosen[0]].ffn.experts, **method.pregate}
    if method.divides:
        changes["elastic"] = without_axis(model.spec.elastic, "ffn")
    return spec_of_layers(model.spec, layers, **changes)


def stacked(experts: Sequence[Parameters]) -> Parameters:
    """Experts' parameters with a leading axis of experts."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *experts)


def filled(fresh: Parameters, given: Mapping[str, Any]) -> Parameters:
    """`fresh` with what is `given` in its place."""
    return {
        name: filled(values, given[name]) if name in given and isinstance(values, dict) else given.get(name, values)
        for name, values in fresh.items()
    }
