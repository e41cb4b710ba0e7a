"""YAML files and command-line overrides → one plain mapping, by Hydra. Imports neither jax nor any spec.

Hydra composes the groups; what a command line says about single values is applied here, on the composed config. So any
field of any depth can be set whether its YAML lists it or not (the strict specs catch mistakes), and a value below an
interpolation (``model.blocks.layer.mixer.heads=8`` where the mixer is ``${mixer}``) changes that place alone.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from efficient_lm.errors import ConfigError, nearest

PALETTES = ("mixer", "ffn")
"""Groups that are no section of a run: a model takes them by interpolation, as in ``mixer: ${mixer}``."""

TEXT_KEYS = ("prompt",)
"""Keys whose value is taken as it is written, so that prose needs no quoting inside the shell's quotes."""


def builtin_configs() -> Path:
    """The config root: inside the installed package, or `configs/` of a checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


@dataclass(frozen=True)
class Composed:
    """A composed config.

    Attributes:
        verb: the root it was composed for.
        values: plain dicts, lists and scalars, interpolations resolved, palettes taken out.
        choices: what was chosen of each group, None for nothing.
    """

    verb: str
    values: dict[str, Any]
    choices: dict[str, str | None] = field(default_factory=dict)

    def to_yaml(self) -> str:
        """As YAML text."""
        return to_yaml(self.values)


def to_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML that `read_yaml` reads back unchanged."""
    return OmegaConf.to_yaml(OmegaConf.create(values, flags={"allow_objects": False}))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Plain values of a YAML file, which cannot run code; interpolations stay text. Raises `ConfigError`."""
    try:
        config = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(_yaml_fault(error, str(path))) from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: holds no mapping")
    return OmegaConf.to_container(config, resolve=False)


@dataclass(frozen=True)
class ConfigRoots:
    """The built-in config root and what a user adds to it."""

    extra: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config_dirs: Iterable[str | Path]) -> "ConfigRoots":
        """With the user's folders. Raises `ConfigError` for one that is missing or hides a built-in file."""
        roots = cls(tuple(Path(folder).absolute() for folder in config_dirs))
        for folder in roots.extra:
            if not folder.is_dir():
                raise ConfigError(f"--config-dir: {folder} is not a folder")
            for file in sorted(folder.rglob("*.yaml")):
                name = file.relative_to(folder)
                if (builtin_configs() / name).exists():
                    raise ConfigError(f"--config-dir: {file} has the name of a built-in config; give it another one")
        return roots

    @property
    def folders(self) -> tuple[Path, ...]:
        """Every folder, the built-in one first."""
        return (builtin_configs(), *self.extra)

    def groups(self) -> list[str]:
        """Names of all groups, ``a/b`` for one inside another."""
        return sorted({name for root in self.folders for name in _groups(root)})

    def choices(self, group: str) -> list[str]:
        """Names of a group's configs."""
        found = {
            str(file.relative_to(root / group).with_suffix(""))
            for root in self.folders
            for file in (root / group).rglob("*.yaml")
        }
        return sorted(found)

    def defaults(self, name: str) -> dict[str, str | None]:
        """Group → default choice, in the order of a root's defaults list; a root it begins with included."""
        groups: dict[str, str | None] = {}
        for entry in read_yaml(builtin_configs() / f"{name}.yaml").get("defaults", []):
            if isinstance(entry, dict):
                groups |= entry
            elif entry != "_self_":
                groups |= self.defaults(entry)
        return groups


@cache
def _groups(root: Path) -> list[str]:
    return [
        str(folder.relative_to(root)) for folder in root.rglob("*") if folder.is_dir() and any(folder.glob("*.yaml"))
    ]


def compose(verb: str, overrides: Sequence[str] = (), config_dirs: Iterable[str | Path] = ()) -> Composed:
    """The config of a verb.

    Args:
        verb: name of a root file, ``train`` for `configs/train.yaml`.
        overrides: as Hydra writes them: ``group=choice``, ``key=value``, ``+key=value``, ``~key``.
        config_dirs: folders of further groups and choices.

    Raises:
        ConfigError: bad syntax, an unknown choice, a palette that nothing reads, a missing value, a bad interpolation.
    """
    roots = ConfigRoots.of(config_dirs)
    known = roots.groups()
    parsed = [_parse(text) for text in overrides]
    of_groups = [override for override in parsed if override.key_or_group in known]
    of_values = [override for override in parsed if override.key_or_group not in known]
    for override in of_groups:
        _check_choice(override, roots)
    config, choices = _compose_groups(verb, [override.input_line for override in of_groups], roots)
    expanded: set[str] = set()
    # Palettes first: a place that departs from its palette departs from the one the user asked for.
    for override in sorted(of_values, key=lambda override: _top(override) not in PALETTES):
        _apply(config, override, expanded)
    touched = _touched_palettes(config, choices, roots, verb, parsed)
    _check_palettes(config, touched, expanded, choices)
    return Composed(verb, _resolved(config), choices)


def _parse(text: str) -> Override:
    key, equals, value = text.partition("=")
    if key in TEXT_KEYS and equals and value[:1] not in ("[", "'", '"'):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'") if value.endswith("\\") else value.replace("'", "\\'")
        text = f"{key}='{escaped}'"
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(_syntax_fault(text)) from error
    if override.is_sweep_override():
        raise ConfigError(
            f"{text}: several values for one run; a list is written {key}=[a,b], text with commas {key}=\"'a, b'\""
        )
    return override


def _syntax_fault(text: str) -> str:
    if "=" not in text and not text.startswith("~"):
        return f"{text}: not an override: write key=value"
    return (
        f"{text}: not a valid override: write key=value, key=[a,b] or key={{a: 1}}; "
        "quote special characters: key=\"'...'\""
    )


def _top(override: Override) -> str:
    return override.key_or_group.split(".")[0]


def _check_choice(override: Override, roots: ConfigRoots) -> None:
    group, value = override.key_or_group, override.value()
    if override.is_delete() or value is None:
        return
    if not isinstance(value, str):
        raise ConfigError(
            f"{group}: takes the name of a config, single values are set as {group}.key=value; "
            f"{nearest(value, roots.choices(group))}"
        )
    if value not in roots.choices(group):
        raise ConfigError(f"{group}={value}: no such config; {nearest(value, roots.choices(group))}")


def _compose_groups(
    name: str | None, overrides: list[str], roots: ConfigRoots
) -> tuple[DictConfig, dict[str, str | None]]:
    """Hydra's part: an unresolved config, and what was chosen of each group."""
    if roots.extra:
        paths = ",".join("'file://" + str(folder).replace("'", "\\'") + "'" for folder in roots.extra)
        overrides = [f"hydra.searchpath=[{paths}]", *overrides]
    try:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(builtin_configs()), version_base="1.3"):
            config = hydra_compose(name, overrides, return_hydra_config=True)
    except MissingConfigException as error:
        if error.options is None:
            raise ConfigError(_first_line(error)) from error
        missing = str(error.missing_cfg_file)
        raise ConfigError(f"{missing}: no such config; {nearest(Path(missing).name, error.options)}") from error
    except ConfigCompositionException as error:
        raise ConfigError(
            ": ".join(filter(None, (_first_line(error), error.__cause__ and _first_line(error.__cause__))))
        ) from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(_yaml_fault(error, "config")) from error
    choices = {
        group: choice for group, choice in config.hydra.runtime.choices.items() if not group.startswith("hydra/")
    }
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    return config, choices


def _apply(config: DictConfig, override: Override, expanded: set[str]) -> None:
    """Set, add or delete one value; palettes copied on the way are added to `expanded`."""
    key, value = override.key_or_group, override.value()
    names = re.findall(r"[^.\[\]]+", key)
    parent = _reach(config, names[:-1], expanded, create=not override.is_delete())
    exists = parent is not None and _has(parent, names[-1])
    if override.is_delete():
        if not exists:
            raise ConfigError(f"~{key}: there is no such key to delete; {nearest(names[-1], _keys(parent))}")
        del parent[names[-1]]
        return
    if override.type is OverrideType.ADD and exists:
        raise ConfigError(f"+{key}: there is one already; write {key}=...")
    try:
        if isinstance(value, dict) and "kind" not in value and exists:
            target = _reach(config, names, expanded, create=True)
            target.merge_with(value)
        else:
            parent[int(names[-1]) if isinstance(parent, ListConfig) else names[-1]] = value
    except (OmegaConfBaseException, ValueError, IndexError) as error:
        raise ConfigError(f"{key}: {_first_line(error)}") from error


def _reach(config: DictConfig, names: list[str], expanded: set[str], create: bool) -> Any:
    """The container at a path. On the way an interpolation becomes a copy of what it names, and a scalar a mapping."""
    here: Any = config
    for name in names:
        if not _has(here, name):
            if not create:
                return None
            if isinstance(here, ListConfig):
                raise ConfigError(f"{'.'.join(names)}: a list of {len(here)} has no item '{name}'")
            here[name] = {}
        key = int(name) if isinstance(here, ListConfig) else name
        if OmegaConf.is_interpolation(here, key):
            target = here._get_node(key)._maybe_dereference_node()
            if isinstance(target, Container):
                expanded |= {palette for palette in PALETTES if _mentions(here._get_node(key)._value(), palette)}
                here[key] = OmegaConf.to_container(target, resolve=False)
        node = here._get_node(key)
        if not isinstance(node, Container) or node._is_none() or node._is_missing():
            if not create:
                return None
            here[key] = {}
        here = here._get_node(key)
    return here


def _has(container: Any, name: str) -> bool:
    if isinstance(container, ListConfig):
        return name.isdigit() and int(name) < len(container)
    return container is not None and name in container.keys()


def _keys(container: Any) -> list[str]:
    return [str(key) for key in container] if isinstance(container, DictConfig) else []


def _mentions(node: Any, palette: str) -> bool:
    """Whether a config has an interpolation of the palette."""
    if isinstance(node, Container):
        node = OmegaConf.to_container(node, resolve=False)
    if isinstance(node, dict):
        return any(_mentions(value, palette) for value in node.values())
    if isinstance(node, list):
        return any(_mentions(value, palette) for value in node)
    return isinstance(node, str) and re.search(rf"\$\{{\s*{palette}\s*[.}}\[]", node) is not None


def _touched_palettes(
    config: DictConfig, choices: dict[str, str | None], roots: ConfigRoots, verb: str, overrides: list[Override]
) -> dict[str, str]:
    """Palettes that somebody set, and how: on the command line, by another choice, or by values of an experiment."""
    touched: dict[str, str] = {}
    defaults = roots.defaults(verb)
    for palette in PALETTES:
        said = [override.input_line for override in overrides if _top(override) == palette]
        if palette not in config:
            continue
        if said:
            touched[palette] = said[0]
        elif choices.get(palette) != defaults.get(palette):
            touched[palette] = f"{palette}={choices.get(palette)}"
        elif OmegaConf.to_container(config[palette]) != _group_file(roots, palette, choices.get(palette)):
            touched[palette] = f"{palette} (set by experiment={choices.get('experiment')})"
    return touched


def _group_file(roots: ConfigRoots, group: str, choice: str | None) -> Any:
    config, _ = _compose_groups(None, [f"+{group}={choice}"], roots)
    return OmegaConf.to_container(config[group])


def _check_palettes(
    config: DictConfig, touched: dict[str, str], expanded: set[str], choices: dict[str, str | None]
) -> None:
    model = choices.get("model")
    for palette in PALETTES:
        if palette in touched and palette not in expanded and not _mentions(config.get("model"), palette):
            blocks = ", ".join(_keys(OmegaConf.select(config, "model.blocks")))
            raise ConfigError(
                f"{touched[palette]}: nothing reads it: model={model} names the {palette} of its blocks itself; "
                f"set model.blocks.NAME.{palette} (blocks: {blocks}), or choose model=uniform"
            )


def _resolved(config: DictConfig) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or _first_line(error).split()[-1]
        raise ConfigError(f"{key}: a value is needed: give {key}=...") from error
    except InterpolationKeyError as error:
        raise ConfigError(_interpolation_fault(config, error)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{getattr(error, 'full_key', None) or 'config'}: {_first_line(error)}") from error
    return {key: value for key, value in values.items() if key not in PALETTES}


def _interpolation_fault(config: DictConfig, error: InterpolationKeyError) -> str:
    found = re.search(r"[Ii]nterpolation key '([^']*)'", str(error))
    if not found:
        return f"{error.full_key}: {_first_line(error)}"
    here: Any = config
    for name in found.group(1).split("."):
        if not _has(here, name):
            break
        here = here[name]
    return f"{error.full_key}: ${{{found.group(1)}}} names no key; {nearest(name, _keys(here))}"


def _yaml_fault(error: Exception, where: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{where}: {_first_line(error)}"
    name = where if mark.name.startswith("<") else mark.name
    return f"{name}:{mark.line + 1}: not valid YAML: {error.problem or error.context}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
