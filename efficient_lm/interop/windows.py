"""Layers that see a window beside layers that see everything: `layer_types`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from efficient_lm.errors import ConfigError, nearest
from efficient_lm.interop.keys import Config, Draft, Inexpressible, Layers, count, listing, put

KINDS = {"sliding_attention": "local", "full_attention": "full"}
"""Type of a layer → name of our block."""


@dataclass(frozen=True)
class LayerTypes:
    """The number of layers, and which of them see a window.

    Attributes:
        depth: the default number of layers.
        window: ``(config) -> tokens`` that a sliding layer sees; None where the config turns windows off.
        default: ``(config, layer) -> type`` of a config that does not list its types.
        beside: ``(window, types) -> keys`` that are written beside `layer_types` and `sliding_window`.
    """

    depth: int
    window: Callable[[Config], int | None]
    default: Callable[[Config, int], str]
    beside: Callable[[int | None, list[str]], Config] = lambda window, types: {}

    def read(self, config: Config, draft: Draft) -> None:
        layers = count(config, "num_hidden_layers", self.depth)
        types = listing(config, "layer_types") or [self.default(config, index) for index in range(layers)]
        if len(types) < layers:
            raise ConfigError(f"layer_types: lists {len(types)} layers, and num_hidden_layers is {layers}")
        for kind in types:
            if kind not in KINDS:
                raise ConfigError(f"layer_types: '{kind}' is not supported; {nearest(str(kind), KINDS)}")
        draft.layout = [KINDS[kind] for kind in types[:layers]]
        draft.kinds = {name: {} for name in KINDS.values()}
        if "local" in draft.layout:
            window = self.window(config)
            if window is None:
                raise ConfigError("layer_types: has sliding_attention, and sliding_window is null or turned off")
            put(draft.kinds["local"], "mixer.window", window)

    def write(self, layers: Layers, config: Config) -> None:
        windows = layers.each("mixer.window")
        distinct = sorted({window for window in windows if window is not None})
        if len(distinct) > 1:
            raise Inexpressible("block.mixer.window", windows)
        window = distinct[0] if distinct else None
        types = ["full_attention" if window is None else "sliding_attention" for window in windows]
        config |= {"num_hidden_layers": len(types), "layer_types": types}
        # With null, some of the reference's families do not run, even if no layer looks through a window.
        config |= {} if window is None else {"sliding_window": window}
        config |= self.beside(window, types)


def by_type(layers: Layers, path: str) -> dict[str, Any]:
    """Type of layer → the value that all layers of it share. Raises `Inexpressible`."""
    found: dict[str, Any] = {}
    for window, value in zip(layers.each("mixer.window"), layers.each(path), strict=True):
        kind = "full_attention" if window is None else "sliding_attention"
        if found.setdefault(kind, value) != value:
            raise Inexpressible(f"block.{path}", value)
    return found
