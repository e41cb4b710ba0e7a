"""The keys of one architecture in a GGUF file's metadata, each of which must be asked for or be harmless."""

from collections.abc import Iterable
from typing import Any

from efficient_lm.errors import CheckpointError, nearest
from efficient_lm.interop.gguf.header import Header

_HARMLESS = {"tensor_data_layout", "rope.scaling.finetuned", "expert_used_count"}
"""Keys that say nothing about what the model computes (the last one when there are no experts)."""


class Metadata:
    """`{architecture}.*` of a header. What was not asked for in the end is an option that nobody honoured.

    Attributes:
        architecture: the prefix of the keys.
    """

    def __init__(self, header: Header, architecture: str):
        self.path, self.architecture = header.path, architecture
        prefix = f"{architecture}."
        found = (key for key in header.metadata if key.startswith(prefix))
        self._values = {key.removeprefix(prefix): header.metadata[key] for key in found}
        self._asked = set(_HARMLESS)

    def has(self, key: str) -> bool:
        """Whether the file has a key."""
        return key in self._values

    def get(self, key: str, default: Any = None) -> Any:
        """A value, the same for all layers where it is one per layer."""
        self._asked.add(key)
        value = self._values.get(key, default)
        if not isinstance(value, list):
            return value
        if not value or any(item != value[0] for item in value):
            raise self.refused(key, "differs between layers, which is not supported")
        return value[0]

    def need(self, key: str) -> Any:
        """A value the model cannot be built without. Raises `CheckpointError` naming the key."""
        if key not in self._values:
            raise CheckpointError(f"{self.path}: the key '{self.architecture}.{key}' is missing")
        return self.get(key)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least one; needed where there is no default."""
        value = self.need(key) if default is None else self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refused(key, f"is {value!r}, not a whole number of at least one")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; needed where there is no default."""
        value = self.need(key) if default is None else self.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.refused(key, f"is {value!r}, not a positive number")
        return value

    def only(self, key: str, allowed: Iterable[Any]) -> None:
        """Refuse a key whose value is none of those that change nothing."""
        allowed = list(allowed)
        if self.has(key) and self.get(key) not in allowed:
            shown = " or ".join(map(str, allowed))
            raise self.refused(key, f"is {self.get(key)!r}, which is not supported; {shown} is")

    def finish(self) -> None:
        """Refuse the first key that was not asked for."""
        for key in self._values:
            if key not in self._asked:
                raise self.refused(key, f"is an option that is not supported; {nearest(key, self._asked)}")

    def refused(self, key: str, reason: str) -> CheckpointError:
        """The error for a key."""
        return CheckpointError(f"{self.path}: '{self.architecture}.{key}' {reason}")
