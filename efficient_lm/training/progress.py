"""Where a run stands."""

from dataclasses import dataclass, field
from typing import Any

_WHERE_SET = ("skipped_rows", "rollbacks", "unvalidated")
"""What a checkpoint's record has only where it is not nothing."""


@dataclass
class Progress:
    """Where a run stands, on the host.

    Attributes:
        step: optimizer steps done.
        tokens: tokens of text that counted in the loss so far; of a synthetic task, of whole rows.
        seconds: wall time of training so far, over all sessions.
        solved: whether the validation accuracy has reached `train.stop_at_accuracy`.
        skipped_rows: by how many rows of data the run is ahead of its steps, because the run went back past them.
        rollbacks: how often it did.
        unvalidated: whether the evaluation of this step is still to be done.
        last_validation: figures of the last evaluation, by their names in a row.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    solved: bool = False
    skipped_rows: int = 0
    rollbacks: int = 0
    unvalidated: bool = False
    last_validation: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_record(cls, record: dict[str, Any], solved: bool) -> "Progress":
        """Where the run of a checkpoint stood."""
        later = {name: record[name] for name in _WHERE_SET if name in record}
        return cls(record["step"], record["tokens"], record["seconds"], solved, **later)

    def record(self, seconds: float) -> dict[str, Any]:
        """What `of_record` reads; `seconds` with those of this session."""
        later = {name: getattr(self, name) for name in _WHERE_SET if getattr(self, name)}
        return {"step": self.step, "tokens": self.tokens, "seconds": seconds, **later}
