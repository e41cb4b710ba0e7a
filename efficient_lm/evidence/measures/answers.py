"""How many answers to a synthetic task are right."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from efficient_lm.evidence.measures.base import Figures, MeasureSpec
from efficient_lm.spec import Count, Listing

ACCURACY = "accuracy"


class AnswersSpec(MeasureSpec):
    """Accuracy on validation rows: `accuracy` as in training, and ``length 256`` at each length asked for.

    Attributes:
        lengths: of rows; empty takes the one of training.
        limit: rows measured at each length; None takes all.
    """

    about = "answers that are right"
    kind: Literal["answers"] = "answers"
    lengths: Listing[Count] = ()
    limit: Count | None = None

    def quality(self, figures: Mapping[str, float]) -> float:
        return figures[ACCURACY]

    def measure(self, run: Path, other: Path | None) -> tuple[Figures, dict[str, Any]]:
        from efficient_lm.api import load
        from efficient_lm.training.run_directory import RunDirectory

        lengths = load(run).evaluate(sequence_length=[*self.lengths] or None, limit=self.limit)["lengths"]
        figures = {ACCURACY: json.loads(RunDirectory(run).summary.read_text())["val_accuracy"]}
        return figures | {f"length {cell['length']}": cell["accuracy"] for cell in lengths}, {"lengths": lengths}
