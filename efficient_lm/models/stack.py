"""Layers into segments, and segments into scans.

Layers that repeat (a period of one or more, several times over) form one segment: their parameters are stacked along a
leading axis `layers` and one `lax.scan` runs over the repeats, the period unrolled inside. Compile time then does not
grow with depth. Layers that differ from their neighbours fall into segments of their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.models.auxiliary import Auxiliary, added
from efficient_lm.models.block import REMAT_NAMES, BlockSpec
from efficient_lm.models.context import Context
from efficient_lm.models.elastic import NumberingSpec
from efficient_lm.models.layers.linear import GROUPED
from efficient_lm.models.parameters import Blueprint, Initialization, Parameters, map_declarations
from efficient_lm.models.sharing import Sharing
from efficient_lm.models.traversal import Passage, State, Traversal
from kernels_pallas.partition import constrained

Remat = Literal["none", "full", "dots", "names"]
Caches = dict[str, dict[str, Any]]
"""Per segment and place in its period, the mixers' caches stacked along a leading axis `layers`."""


@dataclass(frozen=True)
class Segment:
    """`period` repeated `repeats` times, beginning at layer `start`."""

    start: int
    period: tuple[BlockSpec, ...]
    repeats: int

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.period) * self.repeats


def segment(layers: Sequence[BlockSpec]) -> list[Segment]:
    """Cut layers into segments: at each place the repetition that covers most layers, the shortest such period."""
    segments: list[Segment] = []
    start = 0
    while start < len(layers):
        length, repeats = max(_repetitions(layers[start:]), key=lambda found: (found[0] * found[1], -found[0]))
        segments.append(Segment(start, tuple(layers[start : start + length]), repeats))
        start += length * repeats
    return segments


def _repetitions(layers: Sequence[BlockSpec]) -> list[tuple[int, int]]:
    """(period, repeats) of every repetition that begins here; a single layer if there is none."""
    found = [(1, 1)]
    for length in range(1, len(layers) // 2 + 1):
        repeats = 1
        while layers[repeats * length : (repeats + 1) * length] == layers[:length]:
            repeats += 1
        if repeats > 1:
            found.append((length, repeats))
    return found


def checkpoint_policy(remat: Remat, names: Sequence[str]) -> Callable[[Callable], Callable]:
    """The rematerialisation of a block: what its backward pass keeps and what it computes again.

    ``none`` keeps everything, ``full`` only the block's input, ``dots`` also results of matrix products with weights,
    ``names`` also the values named (see `REMAT_NAMES`).
    """
    policies = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(GROUPED),
        ),
        "names": jax.checkpoint_policies.save_only_these_names(*names),
    }
    if remat == "none":
        return lambda function: function
    # Inside a scan nothing can be merged with the forward pass, so the barrier against that is only cost.
    return lambda function: jax.checkpoint(function, policy=policies[remat], prevent_cse=False)


class Carry(NamedTuple):
    """What one repeat of a segment's period leaves to the next.

    Attributes:
        x: the residual stream, or streams.
        state: of the traversal.
        held: keys and values that the next repeat, or later segments, may take, by name.
    """

    x: jax.Array
    state: State
    held: dict[str, Any]


class Step(NamedTuple):
    """What one repeat of a segment's period is given of its own; what there is none of is None.

    Attributes:
        params, caches: by name of the place in the period.
        numbers: what each place is told of its layer's place in the model, int32 ``[period]``.
        tables, inputs: of the traversal and of the context's layer inputs, ``[period, ...]``.
    """

    params: Parameters
    caches: dict[str, Any] | None
    numbers: jax.Array
    tables: Any
    inputs: jax.Array | None


class Stack:
    """The layers between embedding and head.

    Args:
        layers: one resolved spec per layer.
        scan: False unrolls every layer (slower to compile, same result).
        numbering: what layers are told of their place; None: what it is.
    """

    def __init__(
        self,
        layers: Sequence[BlockSpec],
        width: int,
        init: Initialization,
        remat: Remat = "none",
        remat_names: Sequence[str] = REMAT_NAMES,
        scan: bool = True,
        numbering: NumberingSpec | None = None,
    ):
        self.segments, self.depth = segment(layers), numbering.of if numbering else len(layers)
        self.numbers = tuple(numbering.layers if numbering else range(len(layers)))
        self.scan, self.remat = scan, checkpoint_policy(remat, remat_names)
        self.sharing = Sharing(layers, width)
        kinds = {spec: Blueprint(lambda spec=spec: spec.build(width, init)) for spec in dict.fromkeys(layers)}
        self.periods = [[kinds[spec] for spec in part.period] for part in self.segments]

    def init(self, key: jax.Array) -> Parameters:
        """Parameters ``{"segment_0": {"layer_0": {...}}}``, every leaf stacked over the segment's repeats."""
        params: Parameters = {}
        for number, (part, period) in enumerate(zip(self.segments, self.periods, strict=True)):
            # One key per layer of the model: its parameters do not depend on how layers fall into segments.
            keys = jax.vmap(partial(jax.random.fold_in, key))(part.start + jnp.arange(part.layers))
            stacked = keys.reshape(part.repeats, len(period))
            layers = {
                f"layer_{place}": lax.map(blueprint.init, stacked[:, place]) for place, blueprint in enumerate(period)
            }
            params[f"segment_{number}"] = layers
        return params

    @property
    def declarations(self) -> Parameters:
        """Declarations in the shape of the parameters."""
        return {
            f"segment_{number}": {
                f"layer_{place}": map_declarations(lambda d, n=part.repeats: d.stacked(n), blueprint.declarations)
                for place, blueprint in enumerate(period)
            }
            for number, (part, period) in enumerate(zip(self.segments, self.periods, strict=True))
        }

    @property
    def places(self) -> list[tuple[str, str, int]]:
        """Where the parameters of each layer are: segment, place in its period, index along the axis `layers`."""
        return [
            (f"segment_{number}", f"layer_{place}", repeat)
            for number, part in enumerate(self.segments)
            for repeat in range(part.repeats)
            for place in range(len(part.period))
        ]

    def __call__(
        self,
        params: Parameters,
        x: jax.Array,
        context: Context,
        caches: Caches | None = None,
        traversal: Traversal | None = None,
    ) -> tuple[jax.Array, Caches | None, Auxiliary, State]:
        """`x [batch, time, width]` through every layer → the same, the caches with these tokens, auxiliaries, a state.

        With several residual streams `x` is ``[streams, batch, time, width]``.

        Losses are summed over layers; what was observed is ``{"segment_0": {"layer_0": {name: values}}}``, stacked over
        repeats as parameters are. The state is that of the traversal behind the last layer; None without one.
        """
        new_caches: Caches = {}
        losses: dict[str, jax.Array] = {}
        observed: dict[str, Any] = {}
        shared: dict[str, Any] = {}
        state = None if traversal is None else traversal.start(x)
        for number, (part, period) in enumerate(zip(self.segments, self.periods, strict=True)):
            name = f"segment_{number}"
            mine = self.numbers[part.start : part.start + part.layers]
            steps = Step(
                params[name],
                None if caches is None else caches[name],
                jnp.asarray(mine, jnp.int32).reshape(part.repeats, len(period)),
                None if traversal is None else _cut(traversal.tables, part),
                None if context.layer_inputs is None else _cut(context.layer_inputs, part),
            )
            body = self._period(part, period, context, traversal, shared)
            if part.repeats > 1 and self.scan:
                begin = Carry(x, state, self._held(part, body, Carry(x, state, {}), steps, shared))
                (x, state, held), found = lax.scan(body, begin, steps)
            else:
                (x, state, held), found = _unrolled(body, Carry(x, state, {}), steps, part.repeats)
            new_caches[name], more, observed[name] = found
            shared = shared | held
            losses = added(losses, jax.tree.map(lambda values: values.sum(0), more))
        return x, None if caches is None else new_caches, Auxiliary(losses, observed), state

    def _handed(self, part: Segment) -> set[str]:
        """Names of what a segment hands on to its own next repeat, or to later segments."""
        given = set(self.sharing.hands_on[part.start : part.start + part.layers]) - {None}
        return given & self.sharing.wanted_after(part.start + len(part.period))

    def _held(self, part: Segment, body: Callable, carry: Carry, steps: Step, shared: dict[str, Any]) -> dict[str, Any]:
        """What a scan of a segment begins with of what it hands on: zeros where no layer has handed it on yet."""
        if not self._handed(part):
            return {}
        shapes = jax.eval_shape(body, carry, jax.tree.map(lambda leaf: leaf[0], steps))[0].held
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return zeros | {name: shared[name] for name in zeros if name in shared}

    def _period(
        self,
        part: Segment,
        period: Sequence[Blueprint],
        context: Context,
        traversal: Traversal | None,
        shared: dict[str, Any],
    ) -> Callable:
        """One repeat of a period, as `lax.scan` takes it; `shared` is what earlier segments have handed on."""
        handed = self._handed(part)

        def run(carry: Carry, step: Step) -> tuple[Carry, tuple[Any, dict[str, jax.Array], dict[str, Any]]]:
            x, state, found = carry.x, carry.state, shared | carry.held
            new_caches: dict[str, Any] = {}
            losses: dict[str, jax.Array] = {}
            observed: dict[str, Any] = {}
            for place, blueprint in enumerate(period):
                name, layer = f"layer_{place}", part.start + place
                x = constrained(x, (*[None] * (x.ndim - 3), "batch", "time"))
                inputs = None if step.inputs is None else step.inputs[place]
                here = self.told(context, layer, step.numbers[place], inputs, found)
                cache = None if step.caches is None else step.caches[name]
                if traversal is None:
                    x, new_caches[name], more = self._block(blueprint, step.params[name], x, here, cache)
                else:
                    table = jax.tree.map(lambda leaf, place=place: leaf[place], step.tables)
                    x, state, new_caches[name], more = self._accompanied(
                        traversal, state, table, blueprint, step.params[name], x, here, cache
                    )
                losses, observed[name] = added(losses, more.losses), more.observed
                if here.hands_on:
                    found[self.sharing.hands_on[layer]] = more.shared
            held = {name: found[name] for name in handed}
            return Carry(x, state, held), (None if step.caches is None else new_caches, losses, observed)

        return run

    def told(
        self, context: Context, layer: int, number: jax.Array, inputs: jax.Array | None, shared: dict[str, Any]
    ) -> Context:
        """What a layer is told.

        Args:
            layer: its place, or that of another in its segment that is alike.
            number: what it is told of its place.
            inputs: its own of the context's layer inputs.
            shared: what layers so far have handed on, by name.
        """
        takes, gives = self.sharing.takes[layer], self.sharing.hands_on[layer] is not None
        taken = None if takes is None else shared[takes]
        own = {"layer_inputs": inputs, "shared": taken, "hands_on": gives}
        return replace(context, layer=number, layers=self.depth, **own)

    def _block(
        self, blueprint: Blueprint, params: Parameters, x: jax.Array, context: Context, cache: Any
    ) -> tuple[jax.Array, Any, Auxiliary]:
        return self.remat(lambda params, x, cache: blueprint(params)(x, context, cache))(params, x, cache)

    def _accompanied(
        self,
        traversal: Traversal,
        state: State,
        table: Any,
        blueprint: Blueprint,
        params: Parameters,
        x: jax.Array,
        context: Context,
        cache: Any,
    ) -> tuple[jax.Array, State, Any, Auxiliary]:
        """A layer as the traversal has it run."""
        runs = traversal.choose(state, table, context)
        if runs is None:
            after, cache, auxiliary = self._block(blueprint, params, x, context, cache)
            passage = Passage(x, None, after)
        else:
            passage, cache, auxiliary = blueprint(params).gated(x, context, cache, runs, traversal.keeps_caches)
        return passage.after, traversal.watch(state, table, passage, runs, context), cache, auxiliary

    @property
    def passes_by(self) -> bool:
        """Whether depth rules let tokens pass by layers outside of training too."""
        return any(spec.depth is not None and spec.depth.passes_by for part in self.segments for spec in part.period)

    def ran(self, observed: dict[str, Any], live: jax.Array) -> jax.Array:
        """Which tokens ran the mixer, and the ffn, of each layer: bool ``[2, layers, batch, time]``.

        Args:
            observed: of `Auxiliary`; depth rules say so where the context has ``record``.
            live: which tokens count, bool ``[batch, time]``.
        """

        def halves(found: dict[str, jax.Array], repeats: int) -> jax.Array:
            everyone = jnp.broadcast_to(live, (repeats, *live.shape))
            both = [found.get(name, found.get("ran", everyone)) for name in ("mixer_ran", "ffn_ran")]
            return jnp.stack(both) & live

        parts = []
        for number, part in enumerate(self.segments):
            places = [
                halves(observed[f"segment_{number}"][f"layer_{place}"], part.repeats)
                for place in range(len(part.period))
            ]
            parts.append(jnp.stack(places, axis=2).reshape(2, part.layers, *live.shape))
        return jnp.concatenate(parts, axis=1)

    def corrected(self, params: Parameters, counts: dict[str, Any]) -> Parameters:
        """The parameters after an optimizer step, moved by the `counts` of each layer (see `FFNSpec.corrected`)."""
        moved: Parameters = {}
        for number, part in enumerate(self.segments):
            mine, seen = params[f"segment_{number}"], counts[f"segment_{number}"]
            names = [f"layer_{place}" for place in range(len(part.period))]
            moved[f"segment_{number}"] = {
                name: spec.corrected(mine[name], seen[name]) for name, spec in zip(names, part.period, strict=True)
            }
        return moved

    def init_caches(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Caches:
        """Empty caches of every mixer, stacked over each segment's repeats."""

        def stacked(blueprint: Blueprint, repeats: int) -> Any:
            block = blueprint(jax.tree.map(lambda d: None, blueprint.declarations))
            empty = block.init_cache(batch, length, dtype)
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (repeats, *leaf.shape)), empty)

        return {
            f"segment_{number}": {
                f"layer_{place}": stacked(blueprint, part.repeats) for place, blueprint in enumerate(period)
            }
            for number, (part, period) in enumerate(zip(self.segments, self.periods, strict=True))
        }


def _cut(tables: Any, part: Segment) -> Any:
    """Of arrays with a leading axis of layers those of a segment, by repeat and place in its period."""

    def cut(leaf: jax.Array) -> jax.Array:
        mine = leaf[part.start : part.start + part.layers]
        return jnp.reshape(mine, (part.repeats, len(part.period), *leaf.shape[1:]))

    return jax.tree.map(cut, tables)


def _unrolled(body: Callable, carry: Any, steps: Any, repeats: int) -> tuple[Any, Any]:
    """What `lax.scan(body, carry, steps)` computes, layer by layer."""
    found = []
    for index in range(repeats):
        carry, more = body(carry, jax.tree.map(lambda leaf, index=index: leaf[index], steps))
        found.append(more)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
