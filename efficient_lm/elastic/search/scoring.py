"""Submodels scored on calibration rows, all by one compiled program, each once."""

import hashlib
from collections.abc import Callable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.data.packing import Batch
from efficient_lm.elastic.search.base import Fitness, Levels, Space
from efficient_lm.elastic.switched import ChosenStack
from efficient_lm.errors import CheckpointError
from efficient_lm.evaluation.distributions import compared, divergence
from efficient_lm.evaluation.rows import pieces
from efficient_lm.evaluation.token_losses import token_losses
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters
from efficient_lm.training.reporting import MetricsFile, read_metrics

SCORED = "scored.jsonl"
"""What was scored, a line each; the first line says on what."""


class Scorer:
    """Scores submodels, and keeps what it found in a file, so that a search goes on where it stopped.

    Args:
        batch: calibration rows (see `efficient_lm.data.packing.pack`).
        folder: for the file.
        begun: called with the number of each submodel that is computed anew.

    Raises:
        CheckpointError: the file is of another model, other parts of it, other rows or another fitness.
    """

    def __init__(
        self,
        space: Space,
        params: Parameters,
        batch: Batch,
        fitness: Fitness,
        folder: Path,
        dtype: jax.typing.DTypeLike = jnp.float32,
        begun: Callable[[int], None] = lambda number: None,
    ):
        self._params, self._begun = params, begun
        self._batches = [{name: jnp.asarray(part[name]) for name in _READ} for part in pieces(batch)]
        self._tokens = [float(np.sum(part["weights"])) for part in self._batches]
        self._program = jax.jit(scoring(space, fitness, dtype))
        self._scores: dict[tuple[Levels, int], float] = {}
        self.pieces, self.computed = len(self._batches), 0
        about = {
            "of": _fingerprint(params, self._batches),
            "fitness": fitness,
            "levels": [each.parts for each in space.nested],
        }
        self._file = MetricsFile(folder, SCORED)
        self._resume(folder, about)

    def __call__(self, levels: Levels, pieces: int | None = None) -> float:
        """See `search.base.Score`."""
        count = self.pieces if pieces is None else min(pieces, self.pieces)
        key = tuple(int(level) for level in levels), count
        if key not in self._scores:
            self.computed += 1
            self._begun(self.computed)
            chosen = jnp.asarray(levels, jnp.int32)
            sums = [self._program(self._params, chosen, batch) for batch in self._batches[:count]]
            value = float(np.sum(np.asarray(sums), dtype=np.float64)) / max(sum(self._tokens[:count]), 1.0)
            self._scores[key] = value
            self._file.append({"levels": list(key[0]), "pieces": count, "score": value})
        return self._scores[key]

    @property
    def results(self) -> dict[Levels, float]:
        """The submodels that were scored on all rows."""
        return {levels: value for (levels, count), value in self._scores.items() if count == self.pieces}

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _resume(self, folder: Path, about: Mapping[str, Any]) -> None:
        self._file.resume(0)
        rows = read_metrics(folder, SCORED) if self._file.path.exists() else []
        if not rows:
            self._file.append(dict(about))
            return
        if rows[0] != about:
            raise CheckpointError(
                f"{self._file.path}: scores of another model, other parts, other rows or another fitness; "
                "choose another output"
            )
        for row in rows[1:]:
            value = float("nan") if row["score"] is None else row["score"]
            self._scores[tuple(row["levels"]), row["pieces"]] = value


_READ = ("tokens", "targets", "weights", "segment_ids", "positions")


def scoring(space: Space, fitness: Fitness, dtype: jax.typing.DTypeLike) -> Callable[..., jax.Array]:
    """``(params, levels, batch) -> sum``: over weighted targets, the fitness of the submodel that `levels` chooses."""
    model = space.model

    def chosen(levels: jax.Array) -> LanguageModel:
        part = copy(model)
        part.stack = ChosenStack(space.nested[-1].whole, space.nested, levels)
        return part

    def loss(params: Parameters, levels: jax.Array, batch: Batch) -> jax.Array:
        found = token_losses(chosen(levels), params, batch, dtype)
        return jnp.sum(jnp.where(batch["weights"] > 0, found.losses, 0.0) * batch["weights"])

    def kl(params: Parameters, levels: jax.Array, batch: Batch) -> jax.Array:
        return compared((model, params), (chosen(levels), params), batch, divergence, dtype)

    return {"loss": loss, "kl": kl}[fitness]


def _fingerprint(params: Parameters, batches: list[Batch]) -> str:
    """Of the values of parameters and rows."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves((params, batches)):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()[:16]
