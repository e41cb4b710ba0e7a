"""What a family says of itself."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.interop.description import Tensor
from efficient_lm.interop.keys import Binding, ByLayer, Config, Draft, Inexpressible, Layers, Only, merged
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.validation import validate

IGNORED_BY_OURS = (
    "remat", "remat_names", "scan", "init_std", "embedding_std", "implementation", "chunk_size", "lambda_std",
    "balance",
)  # fmt: skip
"""Values of a spec that do not change what a model with given parameters computes."""

_ALWAYS = (
    Only("quantization_config", (None,)),
    Only("is_encoder_decoder", (False,), False),
    Only("is_causal", (True,), True),
)


@dataclass(frozen=True)
class Family:
    """A published family of models: how its config and its tensors are ours.

    Attributes:
        model_type, architecture: how config.json names it.
        model, block: values of the spec that all its models share.
        keys: bindings of config.json, in the order in which they are read.
        tensors: of the model.
        layer_tensors: of each layer, below the prefix `layer`; a mapping gives those of each kind.
        kinds: values of each kind of layer, by our name, where there are several.
        layer: prefix of a layer's tensors, ``model.layers.{}.``.
        prefix: of the base model; folders saved from the base model leave it out.
        dropouts: keys of dropout rates, which training here does not apply.
        ignored: patterns of tensors that are no parameters.
        constants: ``(spec, config) -> (name, float32 array)`` of those among them that folders hold nevertheless.
    """

    model_type: str
    architecture: str
    model: Config
    block: Config
    keys: tuple[Binding, ...]
    tensors: tuple[Tensor, ...]
    layer_tensors: tuple[Tensor, ...] | Mapping[str, tuple[Tensor, ...]]
    kinds: Mapping[str, Config] = field(default_factory=lambda: {"layer": {}})
    layer: str = "model.layers.{}."
    prefix: str = "model."
    dropouts: tuple[str, ...] = ("attention_dropout",)
    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)
    constants: Callable[[ModelSpec, Config], Iterable[tuple[str, np.ndarray]]] = lambda spec, config: ()

    def spec(self, config: Config) -> ModelSpec:
        """The spec of a config.

        Raises:
            ConfigError: an option that cannot be expressed.
            CheckpointError: a missing or malformed value.
        """
        kinds = {name: merged({}, values) for name, values in self.kinds.items()}
        draft = Draft(merged({}, self.model), merged({}, self.block), kinds)
        for binding in (*_ALWAYS, *self.keys):
            binding.read(config, draft)
        try:
            return validate(ModelSpec, draft.values(), "model")
        except ConfigError as error:
            raise CheckpointError(f"{self.model_type} config: {error}") from error

    def config(self, spec: ModelSpec) -> Config:
        """The config of a spec, which read again gives the same model.

        Raises:
            Inexpressible: the family has no words for some value.
        """
        config: Config = {"model_type": self.model_type, "architectures": [self.architecture]}
        layers = Layers(spec, self.kinds)
        for binding in self.keys:
            binding.write(layers, config)
        try:
            again = self.spec(config)
        except (ConfigError, CheckpointError) as error:
            raise Inexpressible(str(error)) from error
        ours, theirs = essence(spec), essence(again)
        if ours != theirs:
            raise Inexpressible(*_first_difference(ours, theirs))
        return config

    def tensors_by_layer(self, spec: ModelSpec) -> list[tuple[Tensor, ...]]:
        """The tensors that each layer may have."""
        if not isinstance(self.layer_tensors, Mapping):
            return [self.layer_tensors] * len(spec.layer_names())
        return [self.layer_tensors[kind] for kind in Layers(spec, self.kinds).kinds]

    @property
    def listed(self) -> set[str]:
        """Paths, in a block, of values that each layer has its own of."""
        return {binding.path for binding in self.keys if isinstance(binding, ByLayer)}

    def applied_dropouts(self, config: Config) -> list[str]:
        """Dropout rates of a config that are not zero."""
        return [name for name in self.dropouts if config.get(name)]


def essence(spec: ModelSpec) -> Config:
    """What a spec computes, as plain values: each layer with its defaults filled in, training's choices left out."""
    layers = Layers(spec)
    left_out = {"blocks", "layout", "repeats", "elastic"}
    if not any(layer.mixer is not None and layer.mixer.goes_by_place for layer in spec.layers()):
        left_out.add("numbering")
    model = {name: value for name, value in layers.model.items() if name not in left_out}
    return _without({**model, "layers": layers.layers})


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without(inner) for name, inner in value.items() if name not in IGNORED_BY_OURS}
    return [_without(item) for item in value] if isinstance(value, (list, tuple)) else value


def _first_difference(ours: Any, theirs: Any, path: str = "") -> tuple[str, Any, Any]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in {**ours, **theirs}:
            if ours.get(name) != theirs.get(name):
                return _first_difference(ours.get(name), theirs.get(name), f"{path}.{name}".lstrip("."))
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (left, right) in enumerate(zip(ours, theirs, strict=True)):
            if left != right:
                return _first_difference(left, right, f"{path}[{index}]")
    return path, ours, theirs
