"""What runs differ in: axes, as Hydra writes choices on a command line and as a sweep file lists them. No jax here."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hydra.core.override_parser.types import Override, QuotedString, RangeSweep

from efficient_lm.composition import ConfigRoots
from efficient_lm.errors import ConfigError, nearest
from efficient_lm.overrides import first_line, parse

Scalar = str | int | float | bool | None

_PLAIN = re.compile(r"[A-Za-z_][\w./-]*")
_WORDS = {"null", "none", "true", "false", "inf", "nan"}


class Value(NamedTuple):
    """A place on an axis.

    Attributes:
        label: tells it from the others of its axis.
        choices: what it means, key → value; several keys where they move together.
        overrides: of a run there.
    """

    label: Scalar
    choices: dict[str, Scalar]
    overrides: tuple[str, ...]


class Span(NamedTuple):
    """Numbers that a search draws from.

    Attributes:
        low, high: both can be drawn.
        step: between them; None: any number.
        log: whether their logarithms are drawn.
        whole: whether they are whole.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Axis:
    """A dimension of a sweep.

    Attributes:
        name: unique in the sweep; its key, or its keys joined by ``+`` where several move together.
        keys: what it sets; of named sets of overrides, the name.
        values: those listed; none of an interval.
        span: where they are numbers in a row, or any of an interval.
    """

    name: str
    keys: tuple[str, ...]
    values: tuple[Value, ...]
    span: Span | None = None

    def at(self, number: float | int) -> Value:
        """The value at a number of the span."""
        shown = int(number) if self.span is not None and self.span.whole else number
        return _value(self.keys[0], shown, as_text(shown))

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values listed, or the first and the last of an interval."""
        return self.values or (self.at(self.span.low), self.at(self.span.high))


def as_text(value: Any) -> str:
    """A plain value as Hydra's grammar reads it back."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {as_text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(as_text, value)) + "]"
    if isinstance(value, str) and not (_PLAIN.fullmatch(value) and value.lower() not in _WORDS):
        # Inside quotes a backslash is itself, unless a quote follows.
        return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value) + "'"
    return value if isinstance(value, str) else repr(value)


def axis_of_override(text: str, roots: ConfigRoots) -> Axis:
    """The axis of ``key=a,b``, ``key=choice(a,b)``, ``key=range(1,5)``, ``key=interval(1e-4,1e-2)`` or ``key=glob(*)``.

    `tag(log, interval(...))` and ``int(interval(...))`` say how a search draws.

    Raises:
        ConfigError: bad syntax, no value, a value given twice, an order drawn at random.
    """
    override = parse(text, several=True)
    key = override.key_or_group
    if override.is_delete():
        raise ConfigError(f"{text}: deletes the same in every run; write it by itself, ~{key}")
    if getattr(override._value, "shuffle", False):
        raise ConfigError(f"{text}: shuffled anew at every start; leave shuffle() out")
    written = ("+" if override.is_add() else "") + key
    if override.is_interval_sweep():
        return Axis(key, (key,), (), _interval(override, text))
    if override.is_choice_sweep() and type(override._value).__name__ == "Glob":
        return _axis(key, [_value(key, name, name) for name in _matching(override, roots)], text)
    try:
        texts, values = list(override.sweep_string_iterator()), list(override.sweep_iterator())
    except Exception as error:
        raise ConfigError(f"{text}: {first_line(error)}") from error
    found = [_value(key, _plain(value), said, written) for value, said in zip(values, texts, strict=True)]
    span = _range(override._value, values) if isinstance(override._value, RangeSweep) else None
    return _axis(key, found, text, span)


def axis_of_values(key: str, given: Any, roots: ConfigRoots, place: str = "axes") -> Axis:
    """The axis that a sweep file lists.

    Args:
        given: values; a text in Hydra's grammar, ``range(1,5)``; or names, each with the overrides it stands for.
        place: of the mapping that has it, for messages.

    Raises:
        ConfigError: no value, one value, a value given twice.
    """
    if isinstance(given, str):
        text = f"{key}={given}"
        if not parse(text, several=True).is_sweep_override():
            raise ConfigError(f"{place}.{key}: '{given}' is one value, and no choice: move it to base, as {text}")
        return axis_of_override(text, roots)
    if isinstance(given, Mapping):
        values = [Value(name, {key: name}, _overrides(said, f"{place}.{key}.{name}")) for name, said in given.items()]
        return _axis(key, values, f"{place}.{key}")
    if not isinstance(given, Sequence):
        raise ConfigError(f"{place}.{key}: expected a list of values; got {given}")
    plain = key.lstrip("+")
    return _axis(plain, [_value(plain, _plain(each), as_text(each), key) for each in given], f"{place}.{key}")


def zipped(given: Mapping[str, Any], roots: ConfigRoots) -> Axis:
    """The axis of several keys that move together. Raises `ConfigError` where they have not as many values each."""
    axes = [axis_of_values(key, values, roots, "zip") for key, values in given.items()]
    counts = {axis.name: len(axis.values) for axis in axes}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        said = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ConfigError(f"zip: keys that move together have as many values each; {said or 'no key is given'}")
    together = [
        Value(
            "+".join(str(value.label) for value in values),
            {key: choice for value in values for key, choice in value.choices.items()},
            tuple(override for value in values for override in value.overrides),
        )
        for values in zip(*(axis.values for axis in axes), strict=True)
    ]
    keys = tuple(key for axis in axes for key in axis.keys)
    return _axis("+".join(counts), together, "zip", keys=keys)


def _axis(
    key: str, values: Sequence[Value], said: str, span: Span | None = None, keys: tuple[str, ...] | None = None
) -> Axis:
    if not values:
        raise ConfigError(f"{said}: an empty choice; give at least one value")
    labels = [str(value.label) for value in values]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ConfigError(f"{said}: {twice} comes twice")
    return Axis(key, keys or (key,), tuple(values), span)


def _value(key: str, shown: Scalar, text: str, written: str | None = None) -> Value:
    return Value(shown, {key: shown}, (f"{written or key}={text}",))


def _plain(value: Any) -> Scalar:
    """A scalar as it is, anything else as text."""
    if isinstance(value, QuotedString):
        return value.text
    return value if value is None or isinstance(value, str | int | float | bool) else as_text(value)


def _overrides(said: Any, place: str) -> tuple[str, ...]:
    texts = (said,) if isinstance(said, str) else said
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{place}: expected a list of overrides, as [model.width=64, mixer=gla]; got {said}")
    for text in texts:
        parse(text)
    return tuple(texts)


def _matching(override: Override, roots: ConfigRoots) -> list[str]:
    names = roots.choices(override.key_or_group)
    if not names:
        raise ConfigError(f"{override.input_line}: glob() chooses configs, and there is no such group")
    found = override._value.filter(names)
    if not found:
        raise ConfigError(f"{override.input_line}: an empty choice; {nearest('', names)}")
    return found


def _interval(override: Override, text: str) -> Span:
    interval = override._value
    whole = "int" in interval.tags or (isinstance(interval.start, int) and isinstance(interval.end, int))
    low, high, log = float(interval.start), float(interval.end), "log" in interval.tags
    if not (math.isfinite(low) and math.isfinite(high)) or low >= high or (log and low <= 0):
        above = "; of logarithms above 0" if log else ""
        raise ConfigError(f"{text}: an interval goes from a number to a larger one{above}")
    return Span(low, high, None, log, whole)


def _range(sweep: RangeSweep, values: Sequence[Any]) -> Span | None:
    if len(values) < 2:
        return None
    whole = all(isinstance(value, int) for value in values)
    return Span(min(values), max(values), abs(sweep.step), "log" in sweep.tags, whole)
