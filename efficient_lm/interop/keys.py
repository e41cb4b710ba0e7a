"""The language in which a family says how its config is ours, once for both directions.

A *binding* ties keys of a published config to values of a `ModelSpec`. Reading fills a `Draft` of the spec; writing
takes from the spec's layers what all of them have in common. A spec that was written is read again and compared, so
that a family which cannot express a model never pretends to.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from efficient_lm.errors import CheckpointError, ConfigError, nearest
from efficient_lm.models.language_model import ModelSpec

Config = dict[str, Any]
REQUIRED = object()
ABSENT = object()
"""What a config says of a kind of layer that the model does not have."""


class Inexpressible(Exception):
    """A family's config has no words for a value of a spec: ``Inexpressible(path, value)``."""


@dataclass
class Draft:
    """A `ModelSpec` in the making: plain values.

    Attributes:
        model: values of the model.
        block: values of every block.
        kinds: further values of each kind of block, by name; the words of a name are joined by underscores.
        layout: name of the block of each layer.
    """

    model: Config
    block: Config
    kinds: dict[str, Config] = field(default_factory=lambda: {"layer": {}})
    layout: list[str] = field(default_factory=list)

    def put(self, path: str, value: Any) -> None:
        """Set ``block.mixer.heads`` (in every block), ``attend.mixer.heads`` (in a kind), ``width`` (of the model)."""
        scope, _, rest = path.partition(".")
        for values in self.scoped(scope):
            put(values, rest, copy.deepcopy(value))
        if not self.scoped(scope):
            put(self.model, path, value)

    def scoped(self, scope: str) -> list[Config]:
        """The values of every block, or of the kinds that `scope` names or is a word of."""
        return [self.block] if scope == "block" else [self.kinds[name] for name in self.kinds if _named(scope, name)]

    def values(self) -> Config:
        """What `ModelSpec` validates."""
        used = list(dict.fromkeys(self.layout))
        names = {name: name for name in used} if len(used) > 1 else {used[0]: "layer"}
        blocks = {names[name]: merged(self.block, self.kinds[name]) for name in used}
        layout, repeats = period([names[name] for name in self.layout])
        return {**self.model, "blocks": blocks, "layout": layout, "repeats": repeats}


class Layers:
    """A spec seen from a config: its plain values, and those of each layer with defaults filled in.

    Attributes:
        kinds: name of the kind of each layer: the first of `kinds` whose values the layer has.
    """

    def __init__(self, spec: ModelSpec, kinds: Mapping[str, Config] | None = None):
        self.spec = spec
        self.model = spec.dump()
        self.layers = [layer.resolved(spec.width).dump() for layer in spec.layers()]
        self._known = kinds or {"layer": {}}
        self.kinds = [self._kind(layer) for layer in self.layers]

    def _kind(self, layer: Config) -> str:
        found = [name for name, values in self._known.items() if _has(layer, values)]
        if not found:
            raise Inexpressible("block.mixer.kind", get(layer, "mixer.kind"))
        return found[0]

    def get(self, path: str) -> Any:
        """A value of the model, or one that all layers, or all of a kind, share; `ABSENT` if there is no such layer.

        Raises:
            Inexpressible: the layers do not share one.
        """
        scope, _, rest = path.partition(".")
        if scope != "block" and not any(_named(scope, kind) for kind in self._known):
            return get(self.model, path)
        values = [
            value
            for kind, value in zip(self.kinds, self.each(rest), strict=True)
            if scope == "block" or _named(scope, kind)
        ] or [ABSENT]
        if any(value != values[0] for value in values):
            raise Inexpressible(path, values)
        return values[0]

    def each(self, path: str) -> list[Any]:
        """A value of each layer."""
        return [get(layer, path) for layer in self.layers]

    def words(self, place: int) -> list[str]:
        """One word of the kind of each layer."""
        return [kind.split("_")[place] for kind in self.kinds]


class Binding(Protocol):
    """Ties some keys of a config to some values of a spec."""

    def read(self, config: Config, draft: Draft) -> None:
        """Fill the draft from a config. Raises `ConfigError` for what cannot be expressed."""

    def write(self, layers: Layers, config: Config) -> None:
        """Fill a config from a spec. Raises `Inexpressible`."""


@dataclass(frozen=True)
class Key:
    """One key, one value (at one or several paths that always agree).

    Attributes:
        default: of a config that does not have the key.
        others: further names of the key; each prevails over `name`, and all are written.
        to, back: between published value and ours.
    """

    name: str
    paths: tuple[str, ...]
    default: Any = REQUIRED
    others: tuple[str, ...] = ()
    to: Callable[[Any], Any] = lambda value: value
    back: Callable[[Any], Any] = lambda value: value

    def read(self, config: Config, draft: Draft) -> None:
        name = next((other for other in self.others if other in config), self.name)
        value = self.to(lookup(config, name, self.default))
        for path in self.paths:
            draft.put(path, value)

    def write(self, layers: Layers, config: Config) -> None:
        value = next((found for path in self.paths if (found := layers.get(path)) is not ABSENT), ABSENT)
        if value is not ABSENT:
            config |= dict.fromkeys((self.name, *self.others), self.back(value))


def key(
    name: str,
    *paths: str,
    default: Any = REQUIRED,
    others: tuple[str, ...] = (),
    **convert: Callable[[Any], Any],
) -> Key:
    """``key("hidden_size", "width", default=4096)``."""
    return Key(name, paths, default, others, **convert)


@dataclass(frozen=True)
class ByLayer:
    """A key that lists a value of each layer, or has one for all; it comes behind those that say which layer is what.

    Attributes:
        path: of the value in a block.
        default: ``(layers) -> value`` of a config that does not have the key, or has null.
        single: whether one value may stand for all.
    """

    name: str
    path: str
    default: Callable[[int], Any]
    single: bool = True

    def read(self, config: Config, draft: Draft) -> None:
        layers, stated = len(draft.layout), config.get(self.name)
        value = self.default(layers) if stated is None else stated
        if not isinstance(value, list) and not self.single:
            raise CheckpointError(f"{self.name}: {value!r} is not a list")
        values = value if isinstance(value, list) else [value] * layers
        if len(values) != layers:
            raise ConfigError(f"{self.name}: lists {len(values)} layers, and num_hidden_layers is {layers}")
        for kind in dict.fromkeys(draft.layout):
            own = [value for name, value in zip(draft.layout, values, strict=True) if name == kind]
            put(draft.kinds[kind], self.path, own if any(value != own[0] for value in own) else own[0])

    def write(self, layers: Layers, config: Config) -> None:
        config[self.name] = layers.each(self.path)


@dataclass(frozen=True)
class Always:
    """Values of every model of a family, of which its config says nothing: path → value, or values below the path."""

    values: Mapping[str, Any]

    def read(self, config: Config, draft: Draft) -> None:
        for path, value in self.values.items():
            draft.put(path, value)

    def write(self, layers: Layers, config: Config) -> None:
        """Writes nothing. Reading again shows whether a model has such values; a kind must be right to be read."""
        for path, value in self.values.items():
            found = layers.get(path) if path.endswith(".kind") else ABSENT
            if found not in (value, ABSENT):
                raise Inexpressible(path, found, value)


@dataclass(frozen=True)
class Only:
    """A key that changes the numbers and of which only some values can be expressed.

    `values[0]` is written; None by leaving the key out.
    """

    name: str
    values: tuple[Any, ...]
    default: Any = None

    def read(self, config: Config, draft: Draft) -> None:
        value = config.get(self.name, self.default)
        if value not in self.values:
            shown = " or ".join(str(allowed) for allowed in self.values)
            raise ConfigError(f"{self.name}: {value!r} is not supported; {shown} is")

    def write(self, layers: Layers, config: Config) -> None:
        if self.values[0] is not None:
            config[self.name] = self.values[0]


@dataclass(frozen=True)
class Named:
    """A key whose values are names, each standing for values of ours: ``{"silu": {"block.ffn.kind": "swiglu"}}``.

    Of several names with one meaning, the first is written.
    """

    name: str
    meanings: Mapping[str, Mapping[str, Any]]
    default: str

    def read(self, config: Config, draft: Draft) -> None:
        value = config.get(self.name, self.default)
        if not isinstance(value, str) or value not in self.meanings:
            raise ConfigError(f"{self.name}: {value!r} is not supported; {nearest(str(value), self.meanings)}")
        for path, ours in self.meanings[value].items():
            draft.put(path, ours)

    def write(self, layers: Layers, config: Config) -> None:
        for name, meaning in self.meanings.items():
            if all(layers.get(path) in (ours, ABSENT) for path, ours in meaning.items()):
                config[self.name] = name
                return
        path = next(iter(self.meanings[self.default]))
        raise Inexpressible(path, layers.get(path))


@dataclass(frozen=True)
class Spread:
    """`initializer_range`, the standard deviation of every fresh matrix."""

    name: str = "initializer_range"
    default: float = 0.02

    def read(self, config: Config, draft: Draft) -> None:
        value = config.get(self.name, self.default)
        # Published models are read whole; a spread of zero, which some state, could start nothing new.
        draft.model |= {"init_std": value, "embedding_std": value} if value else {}

    def write(self, layers: Layers, config: Config) -> None:
        config[self.name] = layers.spec.init_std or self.default


ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "relu": "relu",
    "relu2": "relu_squared", "quick_gelu": "quick_gelu", "sigmoid": "sigmoid", "tanh": "tanh", "linear": "identity",
}  # fmt: skip
"""Published name of an activation → ours; of several names, the first is written."""

PLAIN = {theirs: {"block.ffn.activation": ours} for theirs, ours in ACTIVATIONS.items()}
"""Activation of a plain channel mixer → ours."""

_GATED_KINDS = {
    "silu": {"kind": "swiglu"},
    "gelu": {"kind": "geglu", "approximate": False},
    "gelu_tanh": {"kind": "geglu", "approximate": True},
    "relu": {"kind": "reglu"},
}


def gated(*paths: str) -> dict[str, dict[str, Any]]:
    """Activation of the gated channel mixers at these paths → our kind."""
    return {
        theirs: {
            f"{path}.{name}": value
            for path in paths
            for name, value in _GATED_KINDS.get(ours, {"kind": "glu", "activation": ours}).items()
        }
        for theirs, ours in ACTIVATIONS.items()
    }


GATED = gated("block.ffn")
"""Activation of every layer's gated channel mixer → our kind."""


def lookup(config: Config, name: str, default: Any = REQUIRED) -> Any:
    """A value of a config. Raises `CheckpointError` for a missing key that has no default."""
    if name in config:
        return config[name]
    if default is REQUIRED:
        raise CheckpointError(f"no key '{name}'; {nearest(name, config)}")
    return default


def count(config: Config, name: str, default: Any = REQUIRED, least: int = 1) -> int:
    """A whole number of at least `least`. Raises `CheckpointError`."""
    value = lookup(config, name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise CheckpointError(f"{name}: {value!r} is not a whole number of at least {least}")
    return value


def listing(config: Config, name: str) -> list[Any]:
    """A list; empty where the config has none. Raises `CheckpointError` for anything else."""
    return _held(config, name, list, "list")


def mapping(config: Config, name: str) -> Config:
    """A mapping; empty where the config has none. Raises `CheckpointError` for anything else."""
    return _held(config, name, dict, "mapping")


def _held(config: Config, name: str, kind: type, words: str) -> Any:
    value = config.get(name)
    if value is not None and not isinstance(value, kind):
        raise CheckpointError(f"{name}: {value!r} is not a {words}")
    return kind() if value is None else value


def put(values: Config, path: str, value: Any) -> None:
    """Set a dotted path, making mappings on the way."""
    *above, last = path.split(".")
    for name in above:
        values = values.setdefault(name, {})
    values[last] = value


def get(values: Any, path: str) -> Any:
    """The value at a dotted path; None where there is nothing."""
    for name in path.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def merged(first: Config, second: Config) -> Config:
    """Two nested mappings, of which the second prevails."""
    both = copy.deepcopy(first)
    for name, value in second.items():
        inner = both.get(name)
        nested = isinstance(inner, dict) and isinstance(value, dict)
        both[name] = merged(inner, value) if nested else copy.deepcopy(value)
    return both


def _named(scope: str, kind: str) -> bool:
    return scope == kind or scope in kind.split("_")


def _has(values: Any, wanted: Any) -> bool:
    """Whether nested values contain all those wanted."""
    if isinstance(wanted, Mapping):
        return isinstance(values, Mapping) and all(_has(values.get(name), inner) for name, inner in wanted.items())
    return values == wanted


def period(layout: Sequence[str]) -> tuple[list[str], int]:
    """The shortest layout, and how often it repeats."""
    for length in range(1, len(layout) + 1):
        repeats, rest = divmod(len(layout), length)
        if not rest and list(layout[:length]) * repeats == list(layout):
            return list(layout[:length]), repeats
    return list(layout), 1
