"""A run's config at other sizes: other widths, depths and hidden sizes, each tried rather than computed."""

from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from typing import Any, NamedTuple

from efficient_lm.config import RunConfig
from efficient_lm.data.tokenizers import Tokenizer, TokenizerSpec
from efficient_lm.elastic.nested import nested_models
from efficient_lm.errors import ConfigError
from efficient_lm.models.language_model import LanguageModel, ModelSpec
from efficient_lm.models.parameters import parameter_table
from efficient_lm.spec import Spec
from efficient_lm.training.setup import with_vocabulary
from efficient_lm.validation import validate

Hidden = tuple[tuple[str, tuple[int, ...]], ...]
"""Dotted key below `model` of each hidden size of a channel mixer, and its value in each layer that has it."""


class Size(NamedTuple):
    """What is resized of a model.

    Attributes:
        width, repeats: of `ModelSpec`.
        hidden: hidden sizes that differ from those the candidate has at this width.
    """

    width: int
    repeats: int
    hidden: Hidden = ()


class Sizable:
    """A candidate whose model can be had at other sizes. Nothing is allocated.

    Args:
        values: a composed config of `train`, plain.

    Raises:
        ConfigError: what `RunConfig` refuses, or a model that does not work as it is given.
        DataError: the tokenizer whose size the vocabulary takes cannot be read.
    """

    def __init__(self, values: Mapping[str, Any]):
        self.config = with_vocabulary_known(validate(RunConfig, values))
        self.given = Size(self.config.model.width, self.config.model.repeats)
        self._given, self._values = values["model"], self.config.model.dump()
        self._specs: dict[Size, ModelSpec | ConfigError] = {}
        self._built: dict[Size, LanguageModel] = {}

    @cached_property
    def period(self) -> int:
        """Layers of one repeat."""
        return len(self.config.model.layout)

    def spec(self, size: Size) -> ModelSpec:
        """The model at a size. Raises `ConfigError` where its parts do not work there."""
        if size not in self._specs:
            try:
                self._specs[size] = self._made(size)
            except ConfigError as error:
                self._specs[size] = error
        found = self._specs[size]
        if isinstance(found, ConfigError):
            raise found
        return found

    def works(self, size: Size) -> bool:
        """Whether a model has this size."""
        try:
            self.spec(size)
        except ConfigError:
            return False
        return True

    def model(self, size: Size) -> LanguageModel:
        """The same, built."""
        if size not in self._built:
            self._built[size] = self.spec(size).build()
        return self._built[size]

    def hidden(self, size: Size) -> Hidden:
        """The hidden sizes at a size (see `hidden_sizes`)."""
        return hidden_sizes(self.spec(size))

    def overrides(self, size: Size) -> dict[str, Any]:
        """What makes the candidate's model of this size: dotted key → plain value, of what differs."""
        changes: dict[str, Any] = {}
        if size.width != self.given.width:
            changes["model.width"] = size.width
        if size.repeats != self.given.repeats:
            changes["model.repeats"] = size.repeats
        for path, sizes in size.hidden or self._kept_hidden(size):
            key, value = self._settable(path, sizes[0] if len(set(sizes)) == 1 else list(sizes))
            changes[f"model.{key}"] = value
        return changes

    def _settable(self, path: str, hidden: int | list[int]) -> tuple[str, Any]:
        """The key and value that set a hidden size: a whole part where the config leaves that part to its default."""
        *above, last = path.split(".")
        given, part = self._given, self.config.model
        for depth, name in enumerate(above, start=1):
            part = part[name] if isinstance(part, Mapping) else getattr(part, name)
            if name not in given:
                plain = part.model_dump(mode="json", by_alias=True, serialize_as_any=True, exclude_defaults=True)
                return ".".join(above[:depth]), {"kind": part.kind, **plain, last: hidden}
            given = given[name]
        return path, hidden

    def _made(self, size: Size) -> ModelSpec:
        spec = validate(ModelSpec, with_values({"model": self._values}, self.overrides(size))["model"], "model")
        if spec.elastic is not None:
            nested_models(spec.build())
        return spec

    def _kept_hidden(self, size: Size) -> Hidden:
        """Hidden sizes that are given in numbers keep their ratio to the width."""
        if size.width == self.given.width:
            return ()
        ratio, found = size.width / self.given.width, self._fixed_hidden
        return tuple((path, tuple(max(8, round(ratio * one / 8) * 8) for one in sizes)) for path, sizes in found)

    @cached_property
    def _fixed_hidden(self) -> Hidden:
        return tuple(each for each in self.hidden(self.given) if _at(self._values, each[0]) is not None)


def hidden_sizes(spec: ModelSpec) -> Hidden:
    """The hidden sizes of a model's channel mixers and experts; none where no part has any."""
    found: dict[str, list[int]] = {}
    for name, layer in zip(spec.layer_names(), spec.layers(), strict=True):
        ffn = layer.ffn and layer.ffn.resolved(spec.width)
        for path, hidden in _hidden_of(ffn, f"blocks.{name}.ffn") if ffn else ():
            found.setdefault(path, []).append(hidden)
    return tuple((path, tuple(sizes)) for path, sizes in found.items())


def _hidden_of(part: Spec, path: str) -> Iterator[tuple[str, int]]:
    """Of a resolved channel mixer and those inside it, the keys and values of their hidden sizes."""
    for name, value in part:
        if isinstance(value, Spec):
            yield from _hidden_of(value, f"{path}.{name}")
        elif name == "hidden" and isinstance(value, int):
            yield f"{path}.hidden", value


def with_vocabulary_known(config: RunConfig) -> RunConfig:
    """The config with the size of its vocabulary, which the data or the tokenizer says where the model does not."""
    return config if config.model.vocab_size is not None else with_vocabulary(config, _tokenizer(config.tokenizer))


@cache
def _tokenizer(spec: TokenizerSpec) -> Tokenizer:
    """Read once for all candidates that have it."""
    return spec.build()


def embedding_parameters(model: LanguageModel) -> int:
    """Number of values of embeddings and head: all that are laid along the vocabulary, and learned positions."""
    table = parameter_table(model.declarations)
    return sum(declared.size for _, declared in table if {"vocab", "positions"} & set(declared.axes))


def with_values(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with other values at dotted keys; what is given stays as it is."""
    changed = dict(values)
    for key, value in changes.items():
        here, (*above, last) = changed, key.split(".")
        for name in above:
            here[name] = dict(here[name])
            here = here[name]
        here[last] = value
    return changed


def _at(values: Mapping[str, Any], path: str) -> Any:
    for name in path.split("."):
        values = values[name]
    return values
