"""Early exits: layers behind which a token may leave for the head, what the head reads there, and how that is trained.

An exit behind layer n reads the residual stream, or an accelerated stream beside it, through a norm and the model's own
output weights (Schuster et al. 2022, CALM; Elhoushi et al. 2024, LayerSkip). Pondering gives every exit a probability
of its own to leave there.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from pydantic import Field

from efficient_lm.models.context import Context
from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.layers.norms import NormSpec
from efficient_lm.models.parameters import (
    ZEROS,
    Blueprint,
    Constant,
    Initialization,
    Parameters,
    count_parameters,
    map_declarations,
    parameter,
)
from efficient_lm.models.traversal import Passage, Runs, Traversal
from efficient_lm.spec import Choice, Count, Fraction, Listing, OneOf, Positive, Real, Spec


class ExitLossSpec(Choice, role="exit loss"):
    """How exits are trained."""


class WeightedExitLossSpec(ExitLossSpec):
    """A mean of the cross entropies at all exits and at the head, with weights that sum to one.

    Attributes:
        weights: how the weight of an exit behind n layers grows: ``sum``: 1 + ... + (n - 1), and the head's is that of
            one layer less plus their number (LayerSkip, Elhoushi et al. 2024, section 4.1); ``linear``: n (CALM,
            Schuster et al. 2022, section 3.1); ``constant``: 1.
        scale: factor of the exits' weights before they are divided by their sum.
    """

    kind: Literal["weighted"] = "weighted"
    weights: Literal["sum", "linear", "constant"] = "sum"
    scale: Positive = 0.2

    def shares(self, places: tuple[int, ...], depth: int) -> np.ndarray:
        """Weights of the exits behind these numbers of layers and, last, of the head: float64, their sum is one."""
        layers = np.array([*places, depth], np.float64)
        grown = {"sum": layers * (layers - 1) / 2, "linear": layers, "constant": np.ones_like(layers)}[self.weights]
        raw = self.scale * grown
        # The head's own place of LayerSkip: what it has beyond the sum is not scaled.
        raw[-1] = {"sum": depth - 1 + self.scale * (depth - 1) * (depth - 2) / 2}.get(self.weights, grown[-1])
        return raw / raw.sum()


class PonderLossSpec(ExitLossSpec):
    """Pondering (PonderNet, Banino et al. 2021; PALBERT, Balagansky and Gavrilov 2022).

    At every exit a linear map of the stream says with which probability a token leaves that has come so far. The loss
    is the mean cross entropy over where a token may leave, the head being where all do that are left, plus the
    divergence of that distribution from a geometric one.

    Attributes:
        prior: the geometric distribution's probability to leave at an exit.
        penalty: factor of the divergence.
    """

    kind: Literal["ponder"] = "ponder"
    prior: Fraction = 0.2
    penalty: Annotated[Real, Field(ge=0)] = 0.01

    def distribution(self, count: int) -> np.ndarray:
        """The geometric prior over `count` exits and the head, cut off there: float64, their sum is one."""
        steps = self.prior * (1 - self.prior) ** np.arange(count + 1)
        return steps / steps.sum()


class AcceleratedStreamSpec(Spec):
    """A second residual stream that runs ahead: ``p' = p + W↑ silu(W↓ [p, h])`` (M2R2, arXiv 2502.02040).

    Attributes:
        rank: of the map of each layer.
        rate: layers of the model that the stream runs through in one; null: it is to arrive at the last at every exit.
        alignment: factor of its squared distance from the stream it runs ahead to, relative to that one's square.
    """

    rank: Count = 16
    rate: Positive | None = None
    alignment: Positive = 1.0

    def target(self, place: int, depth: int) -> int:
        """The number of layers behind which the model's own stream is what the exit behind `place` layers aims at."""
        return depth if self.rate is None else min(depth, max(place, round(place * self.rate)))


class ExitSpec(Spec):
    """Early exits.

    Attributes:
        layers: exits are behind these, counted from 1.
        every: or behind every so many.
        norm: ``shared`` takes the final norm, ``own`` has one for each exit.
        loss: how they are trained.
        stream: an accelerated stream that the exits read; null reads the model's own.
    """

    layers: Listing[Count] | None = None
    every: Count | None = None
    norm: Literal["shared", "own"] = "shared"
    loss: OneOf[ExitLossSpec] = WeightedExitLossSpec()
    stream: AcceleratedStreamSpec | None = None

    def faults(self, depth: int, normed: bool) -> Iterator[tuple[str, str]]:
        """What cannot work in a model of this many layers, `normed` with a final norm: pairs of (key, message)."""
        yield from place_faults(self.layers, self.every, depth)
        if self.norm == "own" and not normed:
            yield "norm", "the model has no final norm for its exits to have one like it; valid: shared"
        if isinstance(self.loss, PonderLossSpec) and not 0 < self.loss.prior < 1:
            yield "loss.prior", f"{self.loss.prior} leaves always or never; valid: between 0 and 1, such as 0.2"

    def places(self, depth: int) -> tuple[int, ...]:
        """Numbers of layers that the exits are behind, the head left out."""
        return self.layers if self.layers is not None else tuple(range(self.every, depth, self.every))


def place_faults(layers: tuple[int, ...] | None, every: int | None, depth: int) -> Iterator[tuple[str, str]]:
    """Faults of where exits are said to be, in a model of `depth` layers."""
    last = depth - 1
    if (layers is None) == (every is None):
        yield "layers", "say where exits are: either a list of layers, or every=N"
    elif layers is None and not 0 < every < depth:
        yield "every", f"an exit behind every {every} of {depth} layers is none but the head; valid: 1 to {last}"
    elif layers is not None:
        if not layers:
            yield "layers", f"the list is empty; valid: 1 to {last}"
        for place in layers:
            if place > last:
                yield "layers", f"there is no exit behind layer {place} of {depth} but the head; valid: 1 to {last}"
        if list(layers) != sorted(set(layers)):
            yield "layers", f"{list(layers)} must go up; did you mean {sorted(set(layers))}?"


class Halting(nnx.Module):
    """The probability that a token which has come so far leaves here."""

    def __init__(self, width: int, prior: float):
        self.weight = parameter({"embed": width}, ZEROS, sums=(0,))
        self.bias = parameter({}, Constant(math.log(prior / (1 - prior))))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [..., width]` → float32 ``[...]``, the logit."""
        weight = self.weight[...].astype(x.dtype)
        return jnp.einsum("...d,d->...", x, weight, preferred_element_type=jnp.float32) + self.bias[...]


class Accelerator(nnx.Module):
    """What one layer adds to the accelerated stream."""

    def __init__(self, width: int, rank: int, init: Initialization):
        self.down = Linear({"streams": 2, "embed": width}, {"rank": rank}, init=init)
        self.up = Linear({"rank": rank}, {"embed": width}, init=init, residual=True)

    def __call__(self, fast: jax.Array, x: jax.Array) -> jax.Array:
        """Accelerated and own stream in front of a layer, `[..., width]` → the former behind it."""
        return fast + self.up(jax.nn.silu(self.down(jnp.stack([fast, x], axis=-2))))


class Exits:
    """The exits of a model over plain parameters: those of ``norm``, ``halting`` and ``stream`` that it has.

    Args:
        depth: layers of the model.
        norm: its final norm.
    """

    def __init__(self, spec: ExitSpec, depth: int, width: int, norm: NormSpec | None, init: Initialization):
        self.spec, self.depth, self.width, self.places = spec, depth, width, spec.places(depth)
        exits, parts = len(self.places), {}
        if spec.norm == "own":
            parts["norm"] = (Blueprint(lambda: norm.build(width)), exits, "exits")
        if isinstance(spec.loss, PonderLossSpec):
            parts["halting"] = (Blueprint(lambda: Halting(width, spec.loss.prior)), exits, "exits")
        if spec.stream is not None:
            parts["stream"] = (Blueprint(lambda: Accelerator(width, spec.stream.rank, init)), depth, "layers")
        self.parts = parts

    def init(self, key: jax.Array) -> Parameters:
        """Fresh float32 parameters, stacked over exits or layers."""
        return {
            name: lax.map(blueprint.init, jax.random.split(jax.random.fold_in(key, number), count))
            for number, (name, (blueprint, count, _)) in enumerate(self.parts.items())
        }

    @property
    def declarations(self) -> Parameters:
        """Declarations in the shape of the parameters; empty where exits have none of their own."""
        return {
            name: map_declarations(lambda declared, n=count, a=axis: declared.stacked(n, a), blueprint.declarations)
            for name, (blueprint, count, axis) in self.parts.items()
        }

    @property
    def ponders(self) -> bool:
        """Whether exits have a probability to leave."""
        return "halting" in self.parts

    @property
    def stream_flops(self) -> float:
        """Forward FLOPs of the accelerated stream past one layer, for one token; 0 without it."""
        return 2.0 * count_parameters(self.parts["stream"][0].declarations) if "stream" in self.parts else 0.0

    def flops_per_token(self, vocabulary: int) -> float:
        """Forward FLOPs of every exit's head for one token, and of the accelerated stream."""
        return self.depth * self.stream_flops + 2.0 * len(self.places) * self.width * vocabulary

    def numbers(self) -> np.ndarray:
        """Of each layer the number of the exit behind it, that of all exits where there is none: int32 ``[layers]``."""
        numbers = np.full(self.depth, len(self.places), np.int32)
        numbers[np.array(self.places) - 1] = np.arange(len(self.places))
        return numbers

    def streams(self, params: Parameters) -> Any:
        """For a traversal's tables: what the accelerated stream is computed with, by layer."""
        return params["exits"]["stream"] if "stream" in self.parts else ()

    def begin(self, x: jax.Array) -> jax.Array | tuple[()]:
        """The accelerated stream in front of the first layer, if there is one."""
        return x if "stream" in self.parts else ()

    def advance(self, fast: Any, table: Any, x: jax.Array) -> Any:
        """The accelerated stream behind a layer, if there is one, given the model's own in front of it."""
        return self.parts["stream"][0](table)(fast, x) if "stream" in self.parts else ()

    def read(self, fast: Any, after: jax.Array) -> jax.Array:
        """The stream that an exit reads, of the accelerated one and the model's own behind its layer."""
        return fast if "stream" in self.parts else after

    def normed(self, params: Parameters, number: jax.Array | int, stream: jax.Array, shared: Any) -> jax.Array:
        """What the head reads at an exit: `stream [..., width]` through its norm; `shared` is the final one or None."""
        if self.spec.norm == "own":
            shared = self._part("norm", params, number)
        return stream if shared is None else shared(stream)

    def halting(self, params: Parameters, number: jax.Array | int, stream: jax.Array) -> jax.Array:
        """Logit of the probability to leave at an exit that pondering models have: float32 ``[...]``."""
        return self._part("halting", params, number)(stream)

    def _part(self, name: str, params: Parameters, number: jax.Array | int) -> Any:
        return self.parts[name][0](jax.tree.map(lambda leaf: leaf[number], params["exits"][name]))

    def collector(self, params: Parameters) -> "Collector":
        """The traversal that collects what exits are trained on."""
        return Collector(self, params)


class ExitStreams(NamedTuple):
    """What exits are trained on, ``[exits, batch, time, width]`` each.

    Attributes:
        read: the stream that each exit reads.
        targets: the stream that the accelerated one aims at there; None without it.
    """

    read: jax.Array
    targets: jax.Array | None


class Collector(Traversal):
    """Every token runs every layer, and the streams that exits read and aim at are kept."""

    def __init__(self, exits: Exits, params: Parameters):
        self.exits = exits
        self.targets = exits.spec.stream and [exits.spec.stream.target(p, exits.depth) for p in exits.places]
        self.goals = sorted(set(self.targets or ()) - {exits.depth})
        goals = np.full(exits.depth, len(self.goals), np.int32)
        goals[np.array(self.goals, np.int32) - 1] = np.arange(len(self.goals))
        self.tables = {"number": exits.numbers(), "goal": goals, "stream": exits.streams(params)}

    def start(self, x: jax.Array) -> dict[str, Any]:
        def empty(count: int) -> jax.Array:
            return jnp.zeros((count, *x.shape), x.dtype)

        return {"fast": self.exits.begin(x), "read": empty(len(self.exits.places)), "goals": empty(len(self.goals))}

    def watch(
        self, state: dict[str, Any], table: Any, passage: Passage, runs: Runs | None, context: Context
    ) -> dict[str, Any]:
        fast = self.exits.advance(state["fast"], table["stream"], passage.before)
        read = self.exits.read(fast, passage.after)
        return {
            "fast": fast,
            "read": _kept(state["read"], table["number"], read),
            "goals": _kept(state["goals"], table["goal"], passage.after),
        }

    def streams(self, state: dict[str, Any], last: jax.Array) -> ExitStreams:
        """What was collected, given the stream behind the last layer."""
        if self.targets is None:
            return ExitStreams(state["read"], None)
        own = {place: state["goals"][slot] for slot, place in enumerate(self.goals)} | {self.exits.depth: last}
        return ExitStreams(state["read"], jnp.stack([own[place] for place in self.targets]))


def _kept(found: jax.Array, place: jax.Array, stream: jax.Array) -> jax.Array:
    """`found [count, ...]` with a stream at its place; there is none behind a layer whose place is `count`."""
    return found.at[place].set(stream, mode="drop") if len(found) else found
