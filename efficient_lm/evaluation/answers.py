"""Evaluation on a synthetic task: how many answers are right, at one length or several."""

from collections.abc import Callable, Sequence
from typing import Any

from efficient_lm.data.synthetic.base import SyntheticSpec
from efficient_lm.data.tokenizers import Tokenizer
from efficient_lm.errors import ConfigError
from efficient_lm.evaluation.bits_per_byte import evaluate
from efficient_lm.evaluation.text import batch_limits
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters

FIGURES = ("loss", "accuracy", "sequence_accuracy")


def evaluate_answers(
    scorer: Callable,
    model: LanguageModel,
    params: Parameters,
    data: SyntheticSpec,
    tokenizer: Tokenizer,
    seed: int,
    lengths: Sequence[int],
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Score the validation rows of a task.

    Args:
        scorer: from `make_scorer`.
        seed: of the rows; that of training gives the rows which training validates with.
        lengths: tokens of a row; each length is scored by itself.
        limit: at most so many rows of each; None takes all of `data.validation_examples`.
        batch_size: rows at a time; None takes what suits the device.

    Returns:
        `data`: the task, and `lengths`: of each `length` its `loss` (nats per answer), `accuracy` (answers that are
        right), `sequence_accuracy` (rows of which all are), `answers` and `rows`, their numbers, and `ran` where
        `evaluate` has it.

    Raises:
        ConfigError: a task that the model has no tokens or positions for, or that does not fit a length.
    """
    if data.vocab_size > model.spec.vocab_size:
        raise ConfigError(f"data: has {data.vocab_size} token ids, and the model {model.spec.vocab_size}")
    for length in lengths:
        model.check_length(length, "sequence_length")
    opened = [data.open(tokenizer, length, seed) for length in lengths]
    rows = []
    for length, task in zip(lengths, opened, strict=True):
        tokens, most = batch_limits(batch_size, length)
        size = max(1, min(most, tokens // length, limit or most, data.validation_examples))
        scores = evaluate(scorer, params, task.validation_batches(size, limit))
        figures = {name: scores[name] for name in FIGURES}
        ran = {"ran": scores["ran"]} if "ran" in scores else {}
        rows.append({"length": length, **figures, "answers": scores["tokens"], "rows": scores["rows"], **ran})
    return {"data": data.dump(), "lengths": rows}
