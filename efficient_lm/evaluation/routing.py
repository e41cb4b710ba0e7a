"""What the routers of a mixture of experts do on rows of text, and what their experts are worth."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_lm.data.packing import Batch
from efficient_lm.evaluation.layerwise import Layerwise
from efficient_lm.evaluation.probes import Caught, run_probed
from efficient_lm.evaluation.rows import pieces
from efficient_lm.models.block import Block, BlockSpec
from efficient_lm.models.context import Context
from efficient_lm.models.ffns.moe import MoE, MoESpec
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.layers.groups import Groups
from efficient_lm.models.parameters import Parameters

STRETCHES = 8
"""Parts of a row in which dropped routes are counted."""

SUPER_PERCENTILE, SUPER_SHARE = 99.5, 0.1
"""A Super Expert's peak is above this percentile of all, and above this part of the largest."""


@dataclass(frozen=True)
class Routing:
    """What one layer's router and experts did.

    Attributes:
        routes: int32 ``[rows, time, k]``, experts of each token; -1 for none.
        weights: float32, same shape.
        dropped: bool, same shape: routes whose expert had no room.
        peaks: float64 ``[experts]``, the largest magnitude in what an expert's last map returned for its tokens.
        contribution: float64 ``[experts]``, squared error of the layer's result if the expert's were left out, added
            over tokens and values.
        top_k: experts that a token takes.
    """

    routes: np.ndarray
    weights: np.ndarray
    dropped: np.ndarray
    peaks: np.ndarray
    contribution: np.ndarray
    top_k: int

    @property
    def experts(self) -> int:
        """Experts that compute."""
        return len(self.peaks)

    @property
    def load(self) -> np.ndarray:
        """Routes to each expert, int64 ``[experts]``, dropped ones too; experts that compute nothing left out."""
        return self.load_of(slice(None))

    def load_of(self, rows: Any) -> np.ndarray:
        """The load of some rows."""
        routes = self.routes[rows]
        return np.bincount(routes[(routes >= 0) & (routes < self.experts)], minlength=self.experts)

    @property
    def weight(self) -> np.ndarray:
        """Weights that each expert was given, added up: float64 ``[experts]``."""
        inside = (self.routes >= 0) & (self.routes < self.experts) & ~self.dropped
        return np.bincount(self.routes[inside], self.weights[inside].astype(np.float64), minlength=self.experts)

    @property
    def first(self) -> np.ndarray:
        """The expert with the largest weight of each token, int32 ``[rows, time]``; -1 for none."""
        return first_choices(self.routes, self.weights)


def first_choices(routes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of `routes [..., k]` those with the largest weight, ``[...]``; -1 where there are none."""
    place = np.where(routes >= 0, weights, -np.inf).argmax(axis=-1)
    return np.take_along_axis(routes, place[..., None], axis=-1)[..., 0]


def routing(
    model: LanguageModel, params: Parameters, batch: Batch, dtype: jax.typing.DTypeLike = jnp.float32
) -> list[Routing | None]:
    """What each layer's router and experts do on rows (see `efficient_lm.data.packing.pack`); None without experts."""
    look = Layerwise(model, _look, dtype, record=True)
    parts = [jax.tree.map(np.asarray, look.batch(params, part)) for part in pieces(batch)]
    found: list[Routing | None] = []
    for number, layer in enumerate(model.layers):
        seen = [part[number] for part in parts]
        if not isinstance(layer.ffn, MoESpec):
            found.append(None)
            continue
        rows = {name: np.concatenate([part[name] for part in seen])[: len(batch["tokens"])] for name in RECORDED}
        peaks = np.max([part["peaks"] for part in seen], axis=0).astype(np.float64)
        contribution = np.sum([part["contribution"] for part in seen], axis=0, dtype=np.float64)
        named = (rows["routes"], rows["route_weights"], rows["dropped"])
        found.append(Routing(*named, peaks, contribution, layer.ffn.top_k))
    return found


RECORDED = ("routes", "route_weights", "dropped")
"""What routers record of each token."""


def _look(block: Block, spec: BlockSpec, x: jax.Array, context: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
    if not isinstance(spec.ffn, MoESpec):
        return block(x, context)[0], {}
    y, caught, observed = run_probed(block, x, context)
    peaks, contribution = _worth(block.ffn.inner, caught)
    figures = {name: observed[name] for name in RECORDED}
    return y, figures | {"peaks": peaks, "contribution": contribution}


def _worth(mixture: MoE, caught: Caught) -> tuple[jax.Array, jax.Array]:
    """`Routing.peaks` and `Routing.contribution`: one expert at a time, so that memory does not grow with them."""
    rows = caught.x.reshape(-1, caught.x.shape[-1])
    routes, weights, dropped = (caught.observed[name].reshape(len(rows), -1) for name in RECORDED)
    graph, params = nnx.split(mixture.experts)

    def worth(step: tuple[Any, jax.Array]) -> tuple[jax.Array, jax.Array]:
        values, number = step
        alone = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[None], values))
        y = alone.transformed(rows, Groups()).astype(jnp.float32)
        taken = (routes == number) & ~dropped
        power = jnp.sum(jnp.where(taken, weights, 0.0), axis=-1) ** 2 * jnp.sum(y * y, axis=-1)
        peak = jnp.max(jnp.where(jnp.any(taken, axis=-1, keepdims=True), jnp.abs(y), 0.0))
        return peak, jnp.sum(power)

    return jax.lax.map(worth, (params, jnp.arange(mixture.spec.experts)))


def super_experts(layers: Sequence[Routing | None]) -> list[dict[str, Any]]:
    """Experts without which a model may collapse (Su et al. 2025, "Unveiling Super Experts", section 3.1).

    Their peak is above the 99.5th percentile of all experts' and above a tenth of the largest: the largest first, each
    with `layer`, `expert` and `peak`. Among few experts the largest is always one: `peak_over_median` says how far it
    stands out.
    """
    places = [
        (number, expert, float(peak))
        for number, found in enumerate(layers)
        if found is not None
        for expert, peak in enumerate(found.peaks)
    ]
    peaks = np.array([peak for *_, peak in places])
    if not len(peaks) or peaks.max() == 0:
        return []
    least = max(np.percentile(peaks, SUPER_PERCENTILE), SUPER_SHARE * peaks.max())
    middle = max(float(np.median(peaks)), 1e-30)
    return [
        {"layer": layer, "expert": expert, "peak": peak, "peak_over_median": peak / middle}
        for layer, expert, peak in sorted(places, key=lambda place: -place[2])
        if peak > least
    ]


def routes_of(model: LanguageModel, batch: Batch, dtype: jax.typing.DTypeLike) -> Any:
    """``first(params)``: the first choice of every token in each layer with experts, by layer; compiled once."""

    def run(params: Parameters, part: dict[str, jax.Array]) -> Any:
        context = Context(part["positions"], part["segment_ids"], record=True)
        return model.hidden(params, part["tokens"], context, dtype=dtype)[2].observed

    compiled, told = jax.jit(run), ("tokens", "positions", "segment_ids")

    def first(params: Parameters) -> dict[int, np.ndarray]:
        parts = [compiled(params, {name: part[name] for name in told}) for part in pieces(batch)]
        found: dict[int, np.ndarray] = {}
        for number, (segment, place, index) in enumerate(model.stack.places):
            if isinstance(model.layers[number].ffn, MoESpec):
                seen = [part[segment][place] for part in parts]
                choices = [first_choices(*(np.asarray(s[name][index]) for name in RECORDED[:2])) for s in seen]
                found[number] = np.concatenate(choices)[: len(batch["tokens"])]
        return found

    return first


def agreement(
    model: LanguageModel,
    params: Parameters,
    earlier: Iterable[tuple[int, Parameters]],
    batch: Batch,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> list[dict[str, Any]]:
    """How far first choices of earlier parameters are those of `params`.

    Returns:
        For each step its `step` and `agreement`: part of the tokens, by layer with experts.
    """
    first, found = routes_of(model, batch, dtype), []
    last: Mapping[int, np.ndarray] = {}
    for step, before in earlier:
        last = last or first(params)
        then = first(before)
        shares = {number: float(np.mean(then[number][now >= 0] == now[now >= 0])) for number, now in last.items()}
        found.append({"step": step, "agreement": shares})
    return found
