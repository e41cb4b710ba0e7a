"""Experts that were trained apart, around one backbone, in one model (FlexOlmo, Shi et al. 2025, section 3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.composition import differences
from efficient_lm.data.packing import Batch
from efficient_lm.errors import ConfigError
from efficient_lm.models.block import BlockSpec
from efficient_lm.models.elastic import without_axis
from efficient_lm.models.ffns.dense import DenseSpec
from efficient_lm.models.ffns.experts.balance import BalanceSpec
from efficient_lm.models.ffns.experts.router import RouterSpec
from efficient_lm.models.ffns.moe import MoESpec
from efficient_lm.models.language_model import LanguageModel, ModelSpec
from efficient_lm.models.layered import layer_parameters, spec_of_layers, with_layers
from efficient_lm.models.parameters import Parameters
from efficient_lm.upcycling.conversion import stacked
from efficient_lm.upcycling.statistics import Seen, domains_seen, labelled

Rows = Literal["trained", "domains"]

OF_TRAINING = ("blocks", "layout", "repeats", "init_std", "embedding_std", "remat", "remat_names", "scan")
"""Values of a model's spec that sources are not compared by; layers are, one by one."""


@dataclass(frozen=True)
class Source:
    """One of the models that are merged.

    Attributes:
        name: for messages.
        rows: text of its domain (see `efficient_lm.data.packing.pack`); needed where routers begin with domains.
    """

    name: str
    model: LanguageModel
    params: Parameters
    rows: Batch | None = None


@dataclass(frozen=True)
class _Part:
    """The channel mixer of one layer of one source.

    Attributes:
        spec: the mixture; None of a dense one, which is one expert.
        experts: parameters of each.
        router: its parameters; empty without.
        rest: parameters that are no expert's, and not the router's.
    """

    spec: MoESpec | None
    expert: DenseSpec
    experts: list[Parameters]
    router: Parameters
    rest: Parameters


@dataclass(frozen=True)
class _Member:
    """An expert of the result, the same one in every layer: (source, number there) of each that has it."""

    places: list[tuple[int, int]]


def merged(
    sources: Sequence[Source], rows: Rows | None = None, top_k: int | None = None, bias: float | None = None
) -> tuple[ModelSpec, Parameters]:
    """One model with the experts of all sources, and its parameters.

    A mixture brings all its experts, a dense model its channel mixers as one. An expert that several have, to the bit
    and in every layer (the frozen public one), is taken once. Layers that are dense and equal in all stay so.

    Args:
        rows: of routers. ``trained``: as the sources have them, the mean where several have the expert. ``domains``:
            the mean of what the text of the expert's source shows the router, each token's and the mean normalised; of
            an expert that several mixtures have, the trained one. None takes ``trained`` where there is no dense model.
        top_k: experts that a token takes; None: as in the first mixture, or 2.
        bias: added to the score of every expert but the first, the public one: below zero, others are chosen where
            they are clearly better. None: none.

    Raises:
        ConfigError: sources that are not of one architecture or do not share their backbone, or nothing to merge.
    """
    width, first = sources[0].model.spec.width, sources[0].model
    values = [layer_parameters(source.model, source.params) for source in sources]
    _check_specs(sources)
    parts = {
        number: [_part(source.model.layers[number], values[s][number], width) for s, source in enumerate(sources)]
        for number, layer in enumerate(first.layers)
        if isinstance(layer.ffn, MoESpec | DenseSpec)
    }
    parts = {number: found for number, found in parts.items() if _takes_part(found)}
    if not parts:
        raise ConfigError("checkpoints: they are equal: no layer has experts, or channel mixers that differ")
    for number, found in parts.items():
        _check_mixtures(sources, found, number)
    _check_backbone(sources, values, parts)
    members = _members(sources, parts)
    if top_k is not None and top_k > len(members):
        raise ConfigError(f"top_k: {top_k}, but there are {len(members)} experts; at most {len(members)}")
    seen = _seen(sources, members, parts, rows)
    layers, own = list(first.layers), list(values[0])
    for number, found in parts.items():
        template = next((part for part in found if part.spec is not None), found[0])
        ffn = _mixture(template, len(members), top_k, bias)
        router = {"weight": _rows(found, members, {s: layers_seen[number] for s, layers_seen in seen.items()})}
        router |= _vectors(found, members, ffn.router, bias)
        experts = stacked([found[s].experts[e] for ((s, e), *_) in (member.places for member in members)])
        layers[number] = layers[number].model_copy(update={"ffn": ffn})
        inner = {"router": router, "experts": experts, **template.rest}
        own[number] = own[number] | {"ffn": own[number]["ffn"] | {"inner": inner}}
    spec = spec_of_layers(first.spec, layers, elastic=without_axis(first.spec.elastic, "experts"))
    return spec, with_layers(spec.build(), sources[0].params, own)


def _part(layer: BlockSpec, values: Parameters, width: int) -> _Part:
    inner = values["ffn"]["inner"]
    if isinstance(layer.ffn, DenseSpec):
        return _Part(None, layer.ffn.resolved(width), [inner], {}, {})
    ffn = layer.ffn.resolved(width)
    experts = [jax.tree.map(lambda leaf, e=e: leaf[e], inner["experts"]) for e in range(ffn.experts)]
    rest = {name: found for name, found in inner.items() if name not in ("experts", "router")}
    return _Part(ffn, ffn.expert, experts, inner["router"], rest)


def _takes_part(found: Sequence[_Part]) -> bool:
    return any(part.spec is not None or not _equal(part.experts[0], found[0].experts[0]) for part in found)


def _equal(left: Any, right: Any) -> bool:
    if jax.tree.structure(left) != jax.tree.structure(right):
        return False
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)


def _check_specs(sources: Sequence[Source]) -> None:
    """Whether all models are of one architecture but for their experts."""
    described = [_architecture(source.model) for source in sources]
    for source, found in zip(sources, described, strict=True):
        lines = differences(described[0], found)
        if lines:
            raise ConfigError(
                f"checkpoints: {source.name} is of another architecture than {sources[0].name}: {lines[0]}"
            )
        if found["pregate"] is not None:
            raise ConfigError(
                f"checkpoints: {source.name} has one router in front of its layers, which has no rows to merge"
            )


def _architecture(model: LanguageModel) -> dict[str, Any]:
    own = {name: value for name, value in model.spec.dump().items() if name not in OF_TRAINING}
    layers = {
        str(number): layer.resolved(model.spec.width).model_copy(update={"ffn": None}).dump()
        for number, layer in enumerate(model.layers)
    }
    kinds = {
        str(number): "experts" if isinstance(layer.ffn, MoESpec | DenseSpec) else layer.ffn and layer.ffn.kind
        for number, layer in enumerate(model.layers)
    }
    return {**own, "layers": layers, "ffns": kinds}


def _check_mixtures(sources: Sequence[Source], found: Sequence[_Part], number: int) -> None:
    """Whether the experts of a layer are of one kind, and are chosen in one way."""
    template = next((part.spec for part in found if part.spec is not None), None)
    for source, part in zip(sources, found, strict=True):
        lines = differences(found[0].expert.dump(), part.expert.dump(), f"layer {number}: expert")
        if part.spec is not None:
            lines += differences(_manner(template), _manner(part.spec), f"layer {number}")
            if part.spec.zero_experts is not None or part.spec.router.groups > 1:
                lines.append(f"layer {number}: experts that compute nothing, or in groups, cannot be merged")
        elif template is not None and template.shared is not None:
            lines.append(f"layer {number}: its dense ffn is no expert beside a shared one")
        if lines:
            raise ConfigError(f"checkpoints: {source.name} does not fit the others: {lines[0]}")


def _manner(spec: MoESpec) -> dict[str, Any]:
    """What a mixture is but for its number of experts, and for training."""
    return spec.model_copy(update={"experts": 1, "top_k": 1, "balance": BalanceSpec()}).dump()


def _check_backbone(
    sources: Sequence[Source], values: Sequence[Sequence[Parameters]], parts: Mapping[int, Sequence[_Part]]
) -> None:
    """Whether what is no expert's and no router's is equal in all."""
    backbones = [_backbone(source, values[s], parts, s) for s, source in enumerate(sources)]
    for source, found in zip(sources, backbones, strict=True):
        for name, leaf in found.items():
            shared = backbones[0].get(name)
            if shared is not None and not np.array_equal(shared, leaf):
                gap = float(np.abs(np.asarray(shared) - np.asarray(leaf)).max())
                raise ConfigError(
                    f"checkpoints: '{name}' of {source.name} differs from that of {sources[0].name} (by {gap:.3g} at "
                    "most): experts merge around one backbone; train them with train.only=[ffn.inner.experts,router]"
                )


def _backbone(
    source: Source, values: Sequence[Parameters], parts: Mapping[int, Sequence[_Part]], place: int
) -> dict[str, jax.Array]:
    tree: dict[str, Any] = {name: found for name, found in source.params.items() if name != "stack"}
    for number, layer in enumerate(values):
        if number in parts:
            layer = layer | {"ffn": layer["ffn"] | {"inner": parts[number][place].rest}}
        tree[f"layers.{number}"] = layer
    leaves = jax.tree.leaves_with_path(tree)
    return {".".join(step.key for step in path): leaf for path, leaf in leaves}


def _members(sources: Sequence[Source], parts: Mapping[int, Sequence[_Part]]) -> list[_Member]:
    """The experts of all sources, each once."""
    members: list[_Member] = []
    for s, source in enumerate(sources):
        counts = {len(found[s].experts) for found in parts.values()}
        if len(counts) > 1:
            raise ConfigError(f"checkpoints: {source.name} has another number of experts in some layers than in others")
        for e in range(counts.pop()):
            same = next((member for member in members if _same(parts, member.places[0], (s, e))), None)
            if same is None:
                members.append(_Member([(s, e)]))
            else:
                same.places.append((s, e))
    return members


def _same(parts: Mapping[int, Sequence[_Part]], left: tuple[int, int], right: tuple[int, int]) -> bool:
    return all(_equal(found[left[0]].experts[left[1]], found[right[0]].experts[right[1]]) for found in parts.values())


def _seen(
    sources: Sequence[Source], members: Sequence[_Member], parts: Mapping[int, Sequence[_Part]], rows: Rows | None
) -> dict[int, list[Seen | None]]:
    """Of each source whose text says where an expert is chosen: what its routers were shown of it."""
    dense = [s for s in range(len(sources)) if any(found[s].spec is None for found in parts.values())]
    if rows == "trained" and dense:
        raise ConfigError(f"rows: {sources[dense[0]].name} is dense and has no trained router; take rows=domains")
    if rows == "trained" or (rows is None and not dense):
        return {}
    alone = [s for member in members if len(member.places) == 1 for s, _ in member.places]
    for s in set(alone):
        if alone.count(s) > 1:
            raise ConfigError(
                f"rows: {sources[s].name} has {alone.count(s)} experts of its own, and one domain; take rows=trained"
            )
    return {s: domains_seen(sources[s].model, sources[s].params, labelled([sources[s].rows])) for s in {*alone, *dense}}


def _rows(found: Sequence[_Part], members: Sequence[_Member], seen: Mapping[int, Seen]) -> jax.Array:
    """The router of a layer, float32 ``[width, experts]``."""

    def row(member: _Member) -> np.ndarray:
        shown = [seen[s].inputs[0] for s, _ in member.places if s in seen]
        trained = [np.asarray(found[s].router["weight"])[:, e] for s, e in member.places if found[s].spec is not None]
        dense = any(found[s].spec is None for s, _ in member.places)
        own = shown if shown and (dense or len(member.places) == 1) else trained
        return np.mean(own if not dense else shown[:1], axis=0)

    return jnp.asarray(np.stack([row(member) for member in members], axis=1))


def _vectors(
    found: Sequence[_Part], members: Sequence[_Member], router: RouterSpec, bias: float | None
) -> dict[str, jax.Array]:
    """The router's bias and correction, float32 ``[experts]``, as far as it has them."""

    def mean(name: str) -> np.ndarray:
        own = [
            [np.asarray(found[s].router[name])[e] for s, e in member.places if name in found[s].router] or [0.0]
            for member in members
        ]
        return np.array([np.mean(values) for values in own], np.float32)

    wanted = {"bias": router.bias, "correction": router.correction}
    vectors = {name: mean(name) for name, there in wanted.items() if there}
    if bias is not None:
        vectors["bias"][1:] += bias
    return {name: jnp.asarray(values) for name, values in vectors.items()}


def _mixture(template: _Part, experts: int, top_k: int | None, bias: float | None) -> MoESpec:
    if template.spec is None:
        ffn = MoESpec(experts=experts, top_k=min(2, experts), expert=template.expert, router=RouterSpec(normalize=True))
    else:
        ffn = template.spec.model_copy(update={"experts": experts})
    router = ffn.router if bias is None else ffn.router.model_copy(update={"bias": True})
    return ffn.model_copy(update={"top_k": top_k or ffn.top_k, "router": router})
