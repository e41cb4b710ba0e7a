"""Log-likelihoods of continuations: many short requests, batched, padded by buckets, answered in any order."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from efficient_lm.errors import ConfigError
from efficient_lm.evaluation.buckets import Group, count_bucket, group_by_length
from efficient_lm.evaluation.token_losses import TokenLosses, token_losses
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters
from efficient_lm.models.skipping.base import SkippingSpec


class Request(NamedTuple):
    """Token ids: how likely is `continuation` after `context`, which has one token at least?"""

    context: Sequence[int]
    continuation: Sequence[int]


class Answer(NamedTuple):
    """Log-probability in nats, and whether every token of the continuation is the likeliest where it stands."""

    log_probability: float
    greedy: bool


class _Row(NamedTuple):
    """What is read, int32 ``[time]``, and the requests that read it, by index."""

    tokens: np.ndarray
    requests: list[int]


class RequestScorer:
    """Answers requests with one model; compiled programs are kept between calls.

    Requests that read the same tokens share a row, as the choices of a question do that are one token each, and the
    head is computed for the tokens of continuations alone.

    Args:
        longest: tokens that the model reads at most; longer contexts lose their beginning.
        skipping: which layers each token runs; None runs all.
        tokens, most_rows: a batch has at most so many tokens, unless it is one row, and rows.
    """

    def __init__(
        self,
        model: LanguageModel,
        params: Parameters,
        dtype: jax.typing.DTypeLike,
        longest: int,
        tokens: int,
        most_rows: int,
        skipping: SkippingSpec | None = None,
    ):
        self._params, self._longest, self._tokens, self._most_rows = params, longest, tokens, most_rows
        self._scores = jax.jit(
            lambda params, batch: token_losses(model, params, batch, dtype, skipping)._replace(ran=None)
        )

    @property
    def compiled(self) -> int:
        """Number of shapes compiled so far."""
        return self._scores._cache_size()

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Every request's index and answer, as they are ready.

        Raises:
            ConfigError: a continuation that is longer than the model may read.
        """
        rows = self._rows(requests)
        waiting: tuple[list[int], TokenLosses] | None = None
        for group in group_by_length([len(row.tokens) for row in rows], self._tokens, self._most_rows, self._longest):
            batch, asked = _batch([rows[member] for member in group.members], group, requests)
            scores = self._scores(self._params, batch)
            # Answers are read one batch late, so that the device is never idle while the host prepares the next.
            yield from _answers(waiting, requests)
            waiting = asked, scores
        yield from _answers(waiting, requests)

    def _rows(self, requests: Sequence[Request]) -> list[_Row]:
        rows: dict[bytes, _Row] = {}
        for index, (context, continuation) in enumerate(requests):
            if len(continuation) > self._longest:
                raise ConfigError(
                    f"sequence_length: a continuation has {len(continuation)} tokens, and the model reads "
                    f"{self._longest} at a time; set sequence_length to at least {len(continuation)}"
                )
            read = np.array([*context, *continuation][:-1][-self._longest :], np.int32)
            rows.setdefault(read.tobytes(), _Row(read, [])).requests.append(index)
        return list(rows.values())


def _batch(rows: Sequence[_Row], group: Group, requests: Sequence[Request]) -> tuple[dict[str, np.ndarray], list[int]]:
    """The arrays of `token_losses`, and the requests in the order of their targets."""
    batch = {name: np.zeros((group.rows, group.time), np.int32) for name in ("tokens", "segment_ids")}
    batch["positions"] = np.tile(np.arange(group.time, dtype=np.int32), (group.rows, 1))
    chosen, targets, asked = [], [], []
    for number, row in enumerate(rows):
        length = len(row.tokens)
        batch["tokens"][number, :length] = row.tokens
        batch["segment_ids"][number, :length] = 1
        for index in row.requests:
            continuation = requests[index].continuation
            end = number * group.time + length
            chosen += range(end - len(continuation), end)
            targets += continuation
            asked.append(index)
    size = count_bucket(len(chosen), max(len(chosen), group.rows * group.time))
    for name, values in (("chosen", chosen), ("targets", targets)):
        batch[name] = np.zeros(size, np.int32)
        batch[name][: len(values)] = values
    return batch, asked


def _answers(
    waiting: tuple[list[int], TokenLosses] | None, requests: Sequence[Request]
) -> Iterator[tuple[int, Answer]]:
    if waiting is None:
        return
    asked, scores = waiting
    losses, likeliest, start = np.asarray(scores.losses, np.float64), np.asarray(scores.likeliest), 0
    for index in asked:
        part = slice(start, start + len(requests[index].continuation))
        yield index, Answer(float(-losses[part].sum()), bool(likeliest[part].all()))
        start = part.stop
