"""Which layer is of which kind: how many layers there are, and how a family writes down the kind of each.

Where layers differ in two ways (how they mix, and whether they have experts), the name of a kind has two words, and
each has a `Pattern` of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from efficient_lm.errors import ConfigError, nearest
from efficient_lm.interop.keys import Config, Draft, Inexpressible, Layers, count, listing


@dataclass(frozen=True)
class Depth:
    """The number of layers, all of one kind."""

    name: str
    default: int

    def read(self, config: Config, draft: Draft) -> None:
        draft.layout = ["layer"] * count(config, self.name, self.default)

    def write(self, layers: Layers, config: Config) -> None:
        config[self.name] = len(layers.layers)


@dataclass(frozen=True)
class Pattern:
    """The kind of each layer, however a family writes it down.

    Attributes:
        names: ``(config) -> names``, the kind of each layer by our names; raises `ConfigError`.
        keys: ``(names) -> keys`` of the config that say so.
        word: which word of the kind's name this is, where several patterns say one each.
    """

    names: Callable[[Config], list[str]]
    keys: Callable[[list[str]], Config]
    word: int = 0

    def read(self, config: Config, draft: Draft) -> None:
        names = self.names(config)
        before = [f"{kind}_" for kind in draft.layout] if self.word else [""] * len(names)
        draft.layout = [f"{first}{name}" for first, name in zip(before, names, strict=True)]

    def write(self, layers: Layers, config: Config) -> None:
        config |= self.keys(layers.words(self.word))


def listed(
    name: str, kinds: Mapping[str, str], default: Callable[[Config, int], str], depth: int, word: int = 0
) -> Pattern:
    """A `Pattern` of a list like ``layer_types``, with one published name per layer.

    Args:
        name: key of the list.
        kinds: published name → ours.
        default: ``(config, layer) -> published name``, where the config has no list.
        depth: default of ``num_hidden_layers``.
        word: as of `Pattern`.
    """

    def names(config: Config) -> list[str]:
        layers = count(config, "num_hidden_layers", depth)
        types = listing(config, name) or [default(config, index) for index in range(layers)]
        if len(types) < layers:
            raise ConfigError(f"{name}: lists {len(types)} layers, and num_hidden_layers is {layers}")
        for kind in types:
            if kind not in kinds:
                raise ConfigError(f"{name}: '{kind}' is not supported; {nearest(str(kind), kinds)}")
        return [kinds[kind] for kind in types[:layers]]

    def keys(ours: list[str]) -> Config:
        theirs = {mine: published for published, mine in reversed(kinds.items())}
        return {"num_hidden_layers": len(ours), name: [theirs[kind] for kind in ours]}

    return Pattern(names, keys, word)


def every(places: Sequence[int], depth: int) -> tuple[int, int]:
    """Period and offset of places among `depth` layers; beyond the last layer where there is none.

    Raises:
        Inexpressible: they do not come at equal distances.
    """
    first = places[0] if places else depth
    period = places[1] - first if len(places) > 1 else max(depth, first) + 1
    if first >= period or list(places) != list(range(first, depth, period)):
        raise Inexpressible("layout", list(places))
    return period, first


def crossed(first: Mapping[str, Any], second: Mapping[str, Any], both: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """Every kind of the first with every kind of the second: a name of two words → both of their values."""
    return {f"{a}_{b}": both(x, y) for a, x in first.items() for b, y in second.items()}
