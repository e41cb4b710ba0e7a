"""A model with some of its experts left out."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from efficient_lm.errors import ConfigError
from efficient_lm.evaluation.routing import Routing, super_experts
from efficient_lm.models.elastic import without_axis
from efficient_lm.models.ffns.moe import MoESpec
from efficient_lm.models.language_model import LanguageModel, ModelSpec
from efficient_lm.models.layered import layer_declarations, layer_parameters, sliced, spec_of_layers, with_layers
from efficient_lm.models.parameters import Parameters

Importance = Literal["load", "weight", "reconstruction"]
"""What an expert is worth: routes to it, the weights it was given, or the squared error of its layer without it."""

Kept = list[tuple[int, ...] | None]
"""Of each layer the experts that stay, in order; None for a layer without experts."""


def mixtures(model: LanguageModel) -> dict[int, MoESpec]:
    """The layers with experts, by number. Raises `ConfigError` if there is none."""
    found = {number: layer.ffn for number, layer in enumerate(model.layers) if isinstance(layer.ffn, MoESpec)}
    if not found:
        raise ConfigError("checkpoint: no layer has experts")
    return found


def listed_experts(model: LanguageModel, wanted: Sequence[int] | Sequence[Sequence[int]]) -> Kept:
    """The experts a user names: the same in each layer, or a list for each layer with experts.

    Raises:
        ConfigError: an expert there is not, one named twice, as many lists as there are no layers.
    """
    found = mixtures(model)
    by_layer = bool(wanted) and not isinstance(wanted[0], int)
    if by_layer and len(wanted) != len(found):
        raise ConfigError(f"experts: {len(wanted)} lists, but {len(found)} layers have experts")
    lists = wanted if by_layer else [wanted] * len(found)
    kept: Kept = [None] * len(model.layers)
    for (number, mixture), experts in zip(found.items(), lists, strict=True):
        for expert in experts:
            if expert >= mixture.experts:
                raise ConfigError(
                    f"experts: there is no expert {expert} in layer {number}; they are 0 to {mixture.experts - 1}"
                )
        if len(set(experts)) < len(experts):
            raise ConfigError(f"experts: {list(experts)} names an expert twice")
        kept[number] = tuple(sorted(experts))
    return kept


def important_experts(
    model: LanguageModel,
    routing: Sequence[Routing | None],
    count: int,
    by: Importance = "reconstruction",
    uneven: bool = False,
    spare_super_experts: bool = True,
) -> Kept:
    """The most important experts.

    Args:
        routing: what the layers did on some text (see `efficient_lm.evaluation.routing.routing`).
        count: in each layer; with `uneven` on average, by importance relative to the layer's own, and never fewer in a
            layer than a token takes.
        by: what makes one important.
        spare_super_experts: whether Super Experts stay however unimportant they are.

    Raises:
        ConfigError: more than there are, or a number that groups of a router do not divide.
    """
    found = mixtures(model)
    for number, mixture in found.items():
        groups = mixture.router.groups
        if not uneven and count > mixture.experts:
            raise ConfigError(f"experts: {count}, but layer {number} has {mixture.experts}; at most that")
        if groups > 1 and (uneven or count % groups):
            raise ConfigError(
                f"experts: routers choose among {groups} groups of experts, which must keep as many each: "
                f"take a multiple of {groups}, and uneven=false"
            )
    spared = {(place["layer"], place["expert"]) for place in super_experts(routing)} if spare_super_experts else set()
    worth = {number: _worth(routing[number], number, by, spared) for number in found}
    if uneven:
        return _uneven(model, worth, count)
    kept: Kept = [None] * len(model.layers)
    for number, values in worth.items():
        groups = found[number].router.groups
        grouped = values.reshape(groups, -1)
        best = np.argsort(-grouped, axis=1, kind="stable")[:, : count // groups]
        kept[number] = tuple(sorted((best + grouped.shape[1] * np.arange(groups)[:, None]).reshape(-1).tolist()))
    return kept


def _worth(layer: Routing, number: int, by: Importance, spared: set[tuple[int, int]]) -> np.ndarray:
    values = {"load": layer.load, "weight": layer.weight, "reconstruction": layer.contribution}[by].astype(np.float64)
    values = values / max(values.sum(), 1e-300)
    values[[expert for place, expert in spared if place == number]] = np.inf
    return values


def _uneven(model: LanguageModel, worth: dict[int, np.ndarray], count: int) -> Kept:
    """Each layer's best as far as tokens need them, then the best of what is left in all layers."""
    least = {number: min(model.layers[number].ffn.top_k, len(values)) for number, values in worth.items()}
    total = sum(len(values) for values in worth.values())
    wanted = count * len(worth)
    if wanted > total:
        raise ConfigError(f"experts: {count} in each of {len(worth)} layers, but there are {total}")
    order = {number: np.argsort(-values, kind="stable").tolist() for number, values in worth.items()}
    chosen = {number: set(order[number][: least[number]]) for number in worth}
    rest = [(-worth[n][e], n, e) for n in worth for e in order[n][least[n] :]]
    for _, number, expert in sorted(rest)[: max(0, wanted - sum(map(len, chosen.values())))]:
        chosen[number].add(expert)
    return [tuple(sorted(chosen[number])) if number in chosen else None for number in range(len(model.layers))]


def extracted(
    model: LanguageModel, params: Parameters, kept: Kept, top_k: int | None = None
) -> tuple[ModelSpec, Parameters]:
    """A model with the experts that are kept, and its parameters.

    Args:
        top_k: experts that a token takes from then on; None: as before.

    Raises:
        ConfigError: fewer are left than a token takes, groups of a router that keep unequal numbers, or, with one
            router in front of the layers, layers that keep different ones.
    """
    layers, values = list(model.layers), layer_parameters(model, params)
    for number, declared in enumerate(layer_declarations(model)):
        experts = kept[number]
        if experts is None:
            continue
        mixture = layers[number].ffn
        _check(mixture, number, experts, top_k)
        ffn = mixture.model_copy(update={"experts": len(experts), "top_k": top_k or mixture.top_k})
        layers[number] = layers[number].model_copy(update={"ffn": ffn})
        inner = values[number]["ffn"]["inner"]
        # Experts that compute nothing stay; they are numbered after the others, and are the routers' alone.
        routed = (*experts, *range(mixture.experts, mixture.routed))
        inner |= {
            name: sliced(inner[name], declared["ffn"]["inner"][name], "experts", indices)
            for name, indices in (("experts", experts), ("router", routed))
            if name in inner
        }
        values[number] = values[number] | {"ffn": values[number]["ffn"] | {"inner": inner}}
    changes, outer = {"elastic": without_axis(model.spec.elastic, "experts")}, dict(params)
    if model.spec.pregate is not None:
        indices = _shared_choice(model, kept)
        changes["pregate"] = model.spec.pregate.model_copy(update={"experts": len(indices)}).dump()
        outer["pregate"] = sliced(params["pregate"], model.declarations["pregate"], "experts", indices)
    spec = spec_of_layers(model.spec, layers, **changes)
    return spec, with_layers(spec.build(), outer, values)


def check_count(model: LanguageModel, count: int, top_k: int | None = None) -> None:
    """Whether tokens find enough experts where each layer keeps so many. Raises `ConfigError`."""
    for number, mixture in mixtures(model).items():
        _check_left(mixture, number, count, top_k)


def _check_left(mixture: MoESpec, number: int, count: int, top_k: int | None) -> None:
    left, takes = count + mixture.routed - mixture.experts, top_k or mixture.top_k
    if not count or left < takes:
        raise ConfigError(
            f"experts: {left} would be left in layer {number}, and a token takes {takes}; keep at least {takes}"
            + (f", or set top_k to at most {left}" if count else "")
        )


def _check(mixture: MoESpec, number: int, experts: Sequence[int], top_k: int | None) -> None:
    _check_left(mixture, number, len(experts), top_k)
    groups = mixture.router.groups
    counts = np.bincount(np.asarray(experts) * groups // mixture.routed, minlength=groups)
    if groups > 1 and np.ptp(counts):
        raise ConfigError(
            f"experts: the router of layer {number} chooses among {groups} groups of {mixture.routed // groups}; "
            "keep as many of each"
        )


def _shared_choice(model: LanguageModel, kept: Kept) -> tuple[int, ...]:
    choices = {(*experts, *range(model.layers[number].ffn.experts, model.layers[number].ffn.routed))
               for number, experts in enumerate(kept) if experts is not None}  # fmt: skip
    if len(choices) > 1:
        raise ConfigError("experts: all layers share one router in front of them, and must keep the same ones")
    return choices.pop()
