"""What policies share that let a token leave at an exit: it keeps its stream from there on.

Later tokens may run deeper. What they need of a token that left is made of the stream it left with: its keys and
values, or what it does to recurrent states (as CALM has it, Schuster et al. 2022, section 3.3).
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efficient_lm.models.context import Context
from efficient_lm.models.exits import Exits, ExitSpec, place_faults
from efficient_lm.models.parameters import Initialization, Parameters
from efficient_lm.models.skipping.base import SkippingSpec, live, missing
from efficient_lm.models.traversal import Passage, Runs, State, Traversal
from efficient_lm.spec import Count, Listing

if TYPE_CHECKING:
    from efficient_lm.models.language_model import LanguageModel

AT_ONCE = 2048
"""Tokens whose logits at an exit exist at a time."""


class EarlyExitSpec(SkippingSpec):
    """A token leaves at the first exit where a criterion holds.

    Attributes:
        layers: exits are behind these, counted from 1; None takes those of the model. A model that has none is read
            through its final norm and head.
    """

    layers: Listing[Count] | None = None

    def faults(self, model: "LanguageModel") -> Iterator[tuple[str, str]]:
        if model.exits is None:
            if self.layers is None:
                yield "layers", missing("exits", self.kind, list(self.kinds)) + "; or say where to read the head"
            else:
                yield from place_faults(self.layers, None, len(model.layers))
        else:
            if self.layers is not None and not self.layers:
                yield "layers", f"the list is empty; valid: {', '.join(map(str, model.exits.places))}, or null for all"
            for place in self.layers or ():
                if place not in model.exits.places:
                    near = min(model.exits.places, key=lambda exit: abs(exit - place))
                    valid = ", ".join(map(str, model.exits.places))
                    yield "layers", f"the model has no exit behind layer {place}; did you mean {near}? valid: {valid}"

    def deciding(self, model: "LanguageModel") -> np.ndarray:
        exits, numbers = self.exits(model)
        return exits.stream_flops + np.where(numbers < len(exits.places), self.criterion_flops(model), 0.0)

    def criterion_flops(self, model: "LanguageModel") -> float:
        """FLOPs of looking at a token at one exit."""
        raise TypeError(f"{type(self).__name__} does not define criterion_flops")

    def exits(self, model: "LanguageModel") -> tuple[Exits, np.ndarray]:
        """The exits, and of each layer the number of the exit that is looked at behind it, or how many there are."""
        exits = model.exits
        if exits is None:
            exits = Exits(ExitSpec(layers=self.layers), len(model.layers), model.spec.width, None, Initialization())
        numbers = exits.numbers()
        if self.layers is not None:
            numbers[np.setdiff1d(np.arange(len(numbers)), np.array(self.layers) - 1)] = len(exits.places)
        return exits, numbers


class EarlyExit(Traversal):
    """A pass in which tokens leave; a kind says when, in `first` and `leaves`."""

    def __init__(self, spec: EarlyExitSpec, model: "LanguageModel", params: Parameters):
        self.spec, self.model, self.params = spec, model, params
        self.shared = model.head(params["head"]).norm
        self.exits, numbers = spec.exits(model)
        self.tables = {"number": numbers, "stream": self.exits.streams(params)}

    def first(self, batch: int, time: int) -> State:
        """What the criterion remembers, in front of the first exit; every array is `[batch, time]`."""
        return ()

    def leaves(self, seen: State, hidden: jax.Array, number: jax.Array) -> tuple[jax.Array, State]:
        """Which tokens may leave at an exit, bool ``[batch, time]``, given what its head reads; what is remembered."""
        raise TypeError(f"{type(self).__name__} does not define leaves")

    def start(self, x: jax.Array) -> dict[str, Any]:
        left = jnp.zeros(x.shape[:2], bool)
        return {"left": left, "hidden": jnp.zeros_like(x), "fast": self.exits.begin(x), "seen": self.first(*left.shape)}

    def choose(self, state: dict[str, Any], table: Any, context: Context) -> Runs:
        going = live(context) & ~state["left"]
        return Runs(going, going)

    def watch(
        self, state: dict[str, Any], table: Any, passage: Passage, runs: Runs | None, context: Context
    ) -> dict[str, Any]:
        number, going = table["number"], runs.mixer

        def look(state: dict[str, Any]) -> dict[str, Any]:
            stream = self.exits.read(state["fast"], passage.after)
            hidden = self.exits.normed(self.params, number, stream, self.shared)
            leaves, seen = self.leaves(state["seen"], hidden, number)
            leaves &= going
            kept = jnp.where(leaves[..., None], hidden, state["hidden"])
            return state | {"left": state["left"] | leaves, "hidden": kept, "seen": seen}

        def go_on(state: dict[str, Any]) -> dict[str, Any]:
            state = state | {"fast": self.exits.advance(state["fast"], table["stream"], passage.before)}
            return lax.cond(number < len(self.exits.places), look, lambda state: state, state)

        return lax.cond(jnp.any(going), go_on, lambda state: state, state)

    def result(self, state: dict[str, Any], hidden: jax.Array) -> jax.Array:
        return jnp.where(state["left"][..., None], state["hidden"], hidden)

    def of_logits(self, measure: Callable[[jax.Array], jax.Array], hidden: jax.Array) -> jax.Array:
        """`measure` of the logits, float32 ``[vocab]``, of each of `hidden [batch, time, width]`: ``[batch, time]``."""
        rows = hidden.reshape(-1, hidden.shape[-1])

        def found(row: jax.Array) -> jax.Array:
            return measure(self.model.logits_from(self.params, row))

        values = jax.vmap(found)(rows) if len(rows) <= AT_ONCE else lax.map(found, rows, batch_size=AT_ONCE)
        return values.reshape(hidden.shape[:2])


class HeadExitSpec(EarlyExitSpec):
    """A criterion of what the head says at the exits."""

    def criterion_flops(self, model: "LanguageModel") -> float:
        return 2.0 * model.spec.width * model.spec.vocab_size
