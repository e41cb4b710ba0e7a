"""What a command line says about single values: parsed by Hydra's grammar, applied to a composed config."""

import re
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, ValueType
from hydra.errors import HydraException
from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from efficient_lm.errors import ConfigError, nearest

PALETTES = ("mixer", "ffn", "depth")
"""Groups that are no section of a run: a model takes them by interpolation, as in ``mixer: ${mixer}``."""

TEXT_KEYS = ("prompt",)
"""Keys whose value is taken as it is written, so that prose needs no quoting inside the shell's quotes."""


def parse(text: str, several: bool = False) -> Override:
    """One override. Raises `ConfigError` for bad syntax, and unless `several` for more values than one."""
    key, _, value = text.partition("=")
    if key in TEXT_KEYS and value[:1] not in ("[", "'", '"'):
        return Override(OverrideType.CHANGE, key, ValueType.ELEMENT, value.replace("${", "\\${"), input_line=text)
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(_syntax_fault(text)) from error
    if override.is_sweep_override() and not several:
        raise ConfigError(
            f"{text}: several values for one run; a list is written {key}=[a,b], text with commas {key}=\"'a, b'\""
        )
    return override


def _syntax_fault(text: str) -> str:
    if "=" not in text and not text.startswith("~"):
        return f"{text}: not an override: write key=value, such as train.steps=100"
    if re.search(r"^[^\[{'\"]*[=,(]\s*([,)]|$)", text):
        return f"{text}: an empty choice; write key=a,b, with a value on each side of a comma"
    return (
        f"{text}: not a valid override: write key=value, as train.steps=100, key=[a,b] or key={{a: 1}}; "
        "quote special characters: key=\"'...'\""
    )


def apply(config: DictConfig, override: Override, expanded: set[str]) -> None:
    """Set, add or delete one value, in place.

    A mapping is merged into the one that is there, unless it names its `kind`. Palettes that had to be copied into the
    model on the way are added to `expanded`.

    Raises:
        ConfigError: deleting what is not there, adding what is, an item that a list does not have.
    """
    try:
        _edit(config, override, override.key_or_group.split("."), expanded)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{override.key_or_group}: {first_line(error)}") from error


def _edit(config: DictConfig, override: Override, path: list[str], expanded: set[str]) -> None:
    *above, name = path
    value = override.value()
    parent = _reach(config, above, expanded, create=not override.is_delete())
    if override.is_delete():
        if not has(parent, name):
            raise ConfigError(
                f"~{override.key_or_group}: there is no such key to delete; {nearest(name, keys(parent))}"
            )
        del parent[_key(parent, name)]
    elif override.type is OverrideType.ADD and has(parent, name):
        raise ConfigError(f"+{override.key_or_group}: there is one already; write {override.key_or_group}=...")
    elif isinstance(value, dict) and "kind" not in value and has(parent, name):
        _reach(config, [*above, name], expanded, create=True).merge_with(value)
    else:
        _set(parent, name, value, override.key_or_group)


def _reach(config: DictConfig, names: list[str], expanded: set[str], create: bool) -> Any:
    """The container at a path. On the way an interpolation becomes a copy of what it names, and a scalar a mapping."""
    here: Any = config
    for depth, name in enumerate(names, start=1):
        if not has(here, name):
            if not create:
                return None
            _set(here, name, {}, ".".join(names[:depth]))
        key = _key(here, name)
        if OmegaConf.is_interpolation(here, key) and isinstance(here[key], Container):
            text = OmegaConf.to_container(here, resolve=False)[key]
            expanded |= {palette for palette in PALETTES if mentions(text, palette)}
            here[key] = OmegaConf.to_container(here[key], resolve=False)
        if OmegaConf.is_missing(here, key) or not isinstance(here[key], Container):
            if not create:
                return None
            here[key] = {}
        here = here[key]
    return here


def _set(parent: Any, name: str, value: Any, path: str) -> None:
    if isinstance(parent, ListConfig) and not has(parent, name):
        raise ConfigError(f"{path}: a list of {len(parent)} has no item '{name}'")
    parent[_key(parent, name)] = value


def _key(container: Any, name: str) -> str | int:
    return int(name) if isinstance(container, ListConfig) else name


def has(container: Any, name: str) -> bool:
    """Whether a config, or None, has this key or item."""
    if isinstance(container, ListConfig):
        return name.isdigit() and int(name) < len(container)
    return container is not None and name in container.keys()


def keys(container: Any) -> list[str]:
    """Keys of a mapping, none of anything else."""
    return [str(key) for key in container] if isinstance(container, DictConfig) else []


def mentions(node: Any, palette: str) -> bool:
    """Whether a config has an interpolation of the palette."""
    if isinstance(node, Container):
        node = OmegaConf.to_container(node, resolve=False)
    if isinstance(node, dict):
        return any(mentions(value, palette) for value in node.values())
    if isinstance(node, list):
        return any(mentions(value, palette) for value in node)
    return isinstance(node, str) and re.search(rf"\$\{{\s*{palette}\s*[.}}\[]", node) is not None


def first_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
