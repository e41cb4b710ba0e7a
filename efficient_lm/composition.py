"""YAML files and command-line overrides → one plain mapping, by Hydra. Imports neither jax nor any spec.

Hydra composes the groups; what a command line says about single values is applied here, on the composed config. So any
field of any depth can be set whether its YAML lists it or not (the strict specs catch mistakes), and a value below an
interpolation (``model.blocks.layer.mixer.heads=8`` where the mixer is ``${mixer}``) changes that place alone.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from efficient_lm.errors import ConfigError, nearest
from efficient_lm.overrides import PALETTES, apply, first_line, has, keys, mentions, parse
from efficient_lm.untrusted import CONFIG_BYTES, parse_yaml, read_bytes, to_yaml


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


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Plain values of a YAML file (see `untrusted.parse_yaml`); interpolations stay text. Raises `ConfigError`."""
    try:
        values = parse_yaml(read_bytes(Path(path), CONFIG_BYTES, ConfigError))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(_yaml_fault(error, str(path))) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no mapping")
    return values


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

    def values(self, name: str) -> set[str]:
        """Keys that a root gives a value and chooses no config for, whatever groups there are of the name."""
        return set(read_yaml(builtin_configs() / f"{name}.yaml")) - set(self.defaults(name)) - {"defaults"}


@cache
def _groups(root: Path) -> list[str]:
    return [
        str(folder.relative_to(root)) for folder in root.rglob("*") if folder.is_dir() and any(folder.glob("*.yaml"))
    ]


def compose(
    verb: str,
    overrides: Sequence[str] = (),
    config_dirs: Iterable[str | Path] = (),
    optional: Sequence[str] = (),
) -> Composed:
    """The config of a verb.

    Args:
        verb: name of a root file, ``train`` for `configs/train.yaml`.
        overrides: as Hydra writes them: ``group=choice``, ``key=value``, ``+key=value``, ``~key``.
        config_dirs: folders of further groups and choices.
        optional: sections that are left out if a value in them is missing.

    Raises:
        ConfigError: bad syntax, an unknown choice, a palette that nothing reads, a missing value, a bad interpolation.
    """
    roots = ConfigRoots.of(config_dirs)
    known = set(roots.groups()) - roots.values(verb)
    palettes = set(PALETTES) - roots.values(verb)
    parsed = [parse(text) for text in overrides]
    of_groups = [override for override in parsed if override.key_or_group in known]
    of_values = [override for override in parsed if override.key_or_group not in known]
    for override in of_groups:
        _check_choice(override, roots)
    config, choices = _compose_groups(verb, [override.input_line for override in of_groups], roots)
    _choose_no_tokenizer(config, choices, {override.key_or_group for override in of_groups}, roots.defaults(verb))
    source = _last_said("init_from", config, of_values)
    if source is not None:
        whole = _last_said("init_state", config, of_values) == "all"
        chosen = {override.key_or_group for override in of_groups}
        _begin_with(source, whole, config, choices, chosen, roots.defaults(verb))
    composed = _Composition(roots, verb, config, choices, _mentioned(config), source)
    expanded: set[str] = set()
    # Palettes first: a place that departs from its palette departs from the one the user asked for.
    for override in sorted(of_values, key=lambda override: _top(override) not in palettes):
        apply(config, override, expanded)
    for palette in palettes - expanded - _mentioned(config):
        composed.refuse_if_set(palette, parsed)
    for section in optional:
        if section in config and OmegaConf.missing_keys(config[section]):
            del config[section]
    return Composed(verb, _resolved(config, palettes), choices)


def _last_said(key: str, config: DictConfig, overrides: list[Override]) -> str | None:
    """The text of a key at the top, as the command line says last, or a config."""
    said = [override for override in overrides if override.key_or_group == key and not override.is_delete()]
    value = said[-1].value() if said else config.get(key)
    return None if value is None else str(value)


def _begin_with(
    source: str,
    whole: bool,
    config: DictConfig,
    choices: dict[str, str | None],
    said: set[str],
    defaults: dict[str, str | None],
) -> None:
    """Put the model and the tokenizer of `source` in place of those that nobody chose; of a whole run, what it has.

    An experiment that is chosen says the rest itself.
    """
    from efficient_lm.training.initialization import sections

    found = sections(source, whole and "experiment" not in said)
    found = {name: value for name, value in found.items() if name in ("model", "tokenizer") or name not in said}
    _refuse_interpolations(found, source)
    if "tokenizer" in said or choices.get("tokenizer") != defaults.get("tokenizer"):
        del found["tokenizer"]
        found["model"]["vocab_size"] = None
    if "model" in said:
        del found["model"]
    for section, values in found.items():
        config[section] = OmegaConf.create(values, flags={"allow_objects": False})


def _refuse_interpolations(values: Any, source: str, key: str = "") -> None:
    """What came with a model is composed with the user's own config, and there ``${oc.env:HOME}`` would be resolved."""
    if isinstance(values, dict):
        for name, value in values.items():
            _refuse_interpolations(name, source, key)
            _refuse_interpolations(value, source, f"{key}.{name}".lstrip("."))
    elif isinstance(values, list):
        for value in values:
            _refuse_interpolations(value, source, key)
    elif isinstance(values, str) and "${" in values:
        raise ConfigError(f"init_from={source}: {key}: '{values[:60]}' would be an interpolation; it is not resolved")


def _choose_no_tokenizer(
    config: DictConfig, choices: dict[str, str | None], said: set[str], defaults: dict[str, str | None]
) -> None:
    """Data that is made of token ids has no tokenizer, unless somebody chose one."""
    kind, default = OmegaConf.select(config, "data.kind", default="text"), defaults.get("tokenizer")
    if kind != "text" and default is not None and "tokenizer" not in said and choices.get("tokenizer") == default:
        config["tokenizer"] = {"kind": "none"}
        choices["tokenizer"] = "none"


def _mentioned(config: DictConfig) -> set[str]:
    return {palette for palette in PALETTES if mentions(config.get("model"), palette)}


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
            raise ConfigError(first_line(error)) from error
        missing = str(error.missing_cfg_file)
        raise ConfigError(f"{missing}: no such config; {nearest(Path(missing).name, error.options)}") from error
    except ConfigCompositionException as error:
        raise ConfigError(
            ": ".join(filter(None, (first_line(error), error.__cause__ and first_line(error.__cause__))))
        ) from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(_yaml_fault(error, "config")) from error
    choices = {
        group: choice for group, choice in config.hydra.runtime.choices.items() if not group.startswith("hydra/")
    }
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    return config, choices


@dataclass(frozen=True)
class _Composition:
    """What Hydra made, to find out who set a palette that nothing reads.

    Attributes:
        read: palettes that the model mentions before values of the command line are applied.
        source: `init_from`, whose model stands in for the one that the choices name.
    """

    roots: ConfigRoots
    verb: str
    config: DictConfig
    choices: dict[str, str | None]
    read: set[str]
    source: str | None = None

    def refuse_if_set(self, palette: str, overrides: list[Override]) -> None:
        """Raise `ConfigError` if the command line, another choice or an experiment set it."""
        setting = self._setting(palette, overrides)
        if setting is not None:
            blocks = ", ".join(keys(OmegaConf.select(self.config, "model.blocks")))
            named = f"model={self.choices.get('model')}" if self.source is None else f"init_from={self.source}"
            other = ", or choose model=uniform" if self.source is None else ""
            raise ConfigError(
                f"{setting}: nothing reads it: {named} names the {palette} of its blocks itself; "
                f"set model.blocks.NAME.{palette} (blocks: {blocks}){other}"
            )

    def _setting(self, palette: str, overrides: list[Override]) -> str | None:
        if palette not in self.config:
            return None
        said = [override for override in overrides if _top(override) == palette]
        if self.source is not None:
            return said[0].input_line if said else None
        if self._copied(palette):
            said = [override for override in said if override.key_or_group != palette]
        if said:
            return said[0].input_line
        choice = self.choices.get(palette)
        if self._copied(palette):
            return None
        if choice != self.roots.defaults(self.verb).get(palette):
            return f"{palette}={choice}"
        if OmegaConf.to_container(self.config[palette]) != OmegaConf.to_container(self._file(palette)):
            return f"{palette} (set by experiment={self.choices.get('experiment')})"
        return None

    def _copied(self, palette: str) -> bool:
        """Whether an experiment's values below ``${mixer}`` made Hydra put a copy of the palette there."""
        return palette not in self.read and mentions(self._file("model"), palette)

    def _file(self, group: str) -> DictConfig:
        """The chosen config of a group, by itself."""
        return _compose_groups(None, [f"+{group}={self.choices.get(group)}"], self.roots)[0][group]


def _resolved(config: DictConfig, palettes: Collection[str]) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or first_line(error).split()[-1]
        raise ConfigError(f"{key}: a value is needed: give {key}=...") from error
    except InterpolationKeyError as error:
        raise ConfigError(_interpolation_fault(config, error)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{getattr(error, 'full_key', None) or 'config'}: {first_line(error)}") from error
    return {key: value for key, value in values.items() if key not in palettes}


def _interpolation_fault(config: DictConfig, error: InterpolationKeyError) -> str:
    found = re.search(r"[Ii]nterpolation key '([^']*)'", str(error))
    if not found:
        return f"{error.full_key}: {first_line(error)}"
    here: Any = config
    for name in found.group(1).split("."):
        if not has(here, name):
            break
        here = here[name]
    return f"{error.full_key}: ${{{found.group(1)}}} names no key; {nearest(name, keys(here))}"


def _yaml_fault(error: Exception, where: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{where}: {first_line(error)}"
    name = where if mark.name.startswith("<") else mark.name
    return f"{name}:{mark.line + 1}: not valid YAML: {error.problem or error.context}"


def differences(saved: Any, wanted: Any, path: str = "") -> list[str]:
    """Dotted keys at which two plain configs differ, as ``key: saved → wanted``."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        names = sorted(set(saved) | set(wanted))
        return [
            line
            for name in names
            for line in differences(saved.get(name), wanted.get(name), f"{path}.{name}".lstrip("."))
        ]
    return [] if saved == wanted else [f"{path}: {saved} → {wanted}"]
