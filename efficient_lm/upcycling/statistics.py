"""What the channel mixers of a dense model do on texts of several domains."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.data.packing import Batch
from efficient_lm.errors import DataError
from efficient_lm.evaluation.layerwise import Layerwise
from efficient_lm.evaluation.probes import run_probed
from efficient_lm.evaluation.rows import pieces
from efficient_lm.models.block import Block, BlockSpec
from efficient_lm.models.context import Context
from efficient_lm.models.ffns.dense import DenseSpec
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters

ROUNDS = 50
"""Rounds of k-means at most."""


@dataclass(frozen=True)
class Seen:
    """Of one layer's channel mixer, by domain.

    Attributes:
        inputs: float32 ``[domains, width]``, mean of what it read, each token's normalised to length one, normalised.
        activity: float32 ``[domains, hidden]``, mean magnitude of its hidden units; None where it is not dense.
    """

    inputs: np.ndarray
    activity: np.ndarray | None


class Domains(NamedTuple):
    """Rows of text (see `efficient_lm.data.packing.pack`) of several domains.

    Attributes:
        batch: all rows.
        labels: int64 ``[rows]``, the domain of each; -1 for none.
        count: how many domains there are.
    """

    batch: Batch
    labels: np.ndarray
    count: int


def labelled(batches: Sequence[Batch]) -> Domains:
    """Each batch a domain."""
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    labels = np.repeat(np.arange(len(batches)), [len(batch["tokens"]) for batch in batches])
    return Domains(whole, labels, len(batches))


def clustered(params: Parameters, batch: Batch, count: int, seed: int = 0) -> Domains:
    """The rows of a batch in `count` groups of like content, by k-means of their mean token embedding.

    Begins with rows far from each other (Arthur & Vassilvitskii 2007, section 2.2, taking the farthest). A group that
    would be empty keeps its centre. Raises `DataError` where there are fewer rows with text.
    """
    table, real = np.asarray(params["embedding"]["tokens"]), batch["segment_ids"] > 0
    used = np.flatnonzero(real.any(axis=1))
    if len(used) < count:
        raise DataError(f"there are {len(used)} rows of text, too few to be {count} groups; set rows higher")
    points = np.stack([table[batch["tokens"][row][real[row]]].mean(axis=0) for row in used])
    centres = [points[np.random.default_rng(seed).integers(len(points))]]
    while len(centres) < count:
        centres.append(points[np.min([_distance(points, centre) for centre in centres], axis=0).argmax()])
    nearest = np.full(len(points), -1)
    for _ in range(ROUNDS):
        before, nearest = nearest, np.argmin([_distance(points, centre) for centre in centres], axis=0)
        if np.array_equal(before, nearest):
            break
        centres = [
            points[nearest == number].mean(axis=0) if np.any(nearest == number) else centre
            for number, centre in enumerate(centres)
        ]
    labels = np.full(len(real), -1)
    labels[used] = nearest
    return Domains(batch, labels, count)


def domains_seen(
    model: LanguageModel, params: Parameters, domains: Domains, dtype: jax.typing.DTypeLike = jnp.float32
) -> list[Seen | None]:
    """Of each layer what its channel mixer does on each domain; None for a layer without one."""
    look = Layerwise(model, _look, dtype)
    parts = [jax.tree.map(np.asarray, look.batch(params, part)) for part in pieces(domains.batch)]
    return [_seen([part[number] for part in parts], domains) for number in range(len(model.layers))]


def _distance(points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return np.square(points - centre).sum(axis=1)


def _look(block: Block, spec: BlockSpec, x: jax.Array, context: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
    if block.ffn is None:
        return block(x, context)[0], {}
    y, caught, _ = run_probed(block, x, context)
    real = (caught.context.segment_ids > 0).astype(jnp.float32)[..., None]
    wide = caught.x.astype(jnp.float32)
    unit = wide / jnp.maximum(jnp.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
    figures = {"tokens": jnp.sum(real, axis=(1, 2)), "inputs": jnp.sum(unit * real, axis=1)}
    if isinstance(spec.ffn, DenseSpec):
        hidden = jnp.abs(block.ffn.inner.hidden(caught.x).astype(jnp.float32))
        figures["activity"] = jnp.sum(hidden * real, axis=1)
    return y, figures


def _seen(parts: Sequence[dict[str, np.ndarray]], domains: Domains) -> Seen | None:
    """From sums over the tokens of each row, ``[rows, ...]``, in parts."""
    if not parts[0]:
        return None
    rows = {name: np.concatenate([part[name] for part in parts])[: len(domains.labels)] for name in parts[0]}
    member = (domains.labels == np.arange(domains.count)[:, None]).astype(np.float64)
    sums = {name: member @ values for name, values in rows.items()}
    inputs = sums["inputs"] / np.maximum(np.linalg.norm(sums["inputs"], axis=1, keepdims=True), 1e-12)
    if "activity" not in sums:
        return Seen(inputs.astype(np.float32), None)
    return Seen(
        inputs.astype(np.float32), (sums["activity"] / np.maximum(sums["tokens"], 1.0)[:, None]).astype(np.float32)
    )
