"""Which layers take the keys and values of earlier ones, and of which.

A mixer that `takes_keys` takes those of the nearest layer before it that has its own and is alike (`keys_alike`): it
has no maps for them and no cache.
"""

from collections.abc import Iterator, Sequence

from efficient_lm.models.block import BlockSpec


class Sharing:
    """What layers hand on and take, by name.

    Attributes:
        sources: of each layer the number of the one whose keys and values it takes; None where it has its own.
        takes: of each layer the name of what it takes; None: nothing.
        hands_on: of each layer the name of what it hands on, to the layers up to the next that hands on so named; None:
            nothing. Layers that are alike do alike, whoever takes it; those with a depth rule hand nothing on.
    """

    def __init__(self, layers: Sequence[BlockSpec], width: int):
        alike = [None if layer.mixer is None else layer.mixer.keys_alike(width) for layer in layers]
        takes = [layer.mixer is not None and layer.mixer.takes_keys for layer in layers]
        self.sources: list[int | None] = []
        for number, taking in enumerate(takes):
            giving = [n for n in range(number) if not takes[n] and alike[n] == alike[number]]
            self.sources.append(giving[-1] if taking and giving else None)
        wanted = [alike[number] for number, taking in enumerate(takes) if taking]
        names = {what: f"keys_{place}" for place, what in enumerate(dict.fromkeys(wanted))}
        self.takes = [names[what] if taking else None for what, taking in zip(alike, takes, strict=True)]
        gives = [not taking and layer.depth is None for layer, taking in zip(layers, takes, strict=True)]
        self.hands_on = [names.get(what) if giving else None for what, giving in zip(alike, gives, strict=True)]

    def __bool__(self) -> bool:
        return any(name is not None for name in self.takes)

    def wanted_after(self, layer: int) -> set[str]:
        """Names of what layers from this number on take."""
        return {name for name in self.takes[layer:] if name is not None}


def sharing_faults(layers: Sequence[BlockSpec], width: int) -> Iterator[tuple[int, str, str]]:
    """What cannot work of layers that take keys and values: layer, key and message."""
    sharing = Sharing(layers, width)
    for number, source in enumerate(sharing.sources):
        if sharing.takes[number] is None:
            continue
        if source is None:
            yield (
                number,
                "mixer.shares_keys",
                f"no layer before layer {number} has keys and values of its own and the same kind, kv_heads, "
                "head_size, window, kept_tokens and position; give it its own",
            )
            continue
        for place in (number, source):
            if layers[place].depth is not None:
                yield place, "depth", f"layer {number} takes the keys and values of layer {source}: no token passes by"
