"""Mixture of depths: in each row, the tokens that a router scores highest run a block, and the others pass it by."""

import math
from collections.abc import Callable, Iterator
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from efficient_lm.errors import ConfigError
from efficient_lm.models.auxiliary import Auxiliary
from efficient_lm.models.context import Context
from efficient_lm.models.depth.base import DepthSpec, Run, run_if_any
from efficient_lm.models.depth.selected import Selected, first, highest
from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.layers.norms import NormSpec, RMSNormSpec
from efficient_lm.models.mixers.base import Cache, MixerSpec
from efficient_lm.models.parameters import ONES, ZEROS, Initialization, Initializer, parameter
from efficient_lm.spec import Count, Natural, OneOf, PerLayer, Positive, Real

SPARE = 32
"""Tokens that a cache has room for beyond the share that is expected, so that short texts are never cut short."""

WEIGHTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": lambda scores: scores,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}

Capacity = Annotated[Real, Field(gt=0, le=1)]
Selection = Literal["top_k", "causal"]


class MixtureOfDepthsSpec(DepthSpec):
    """Expert-choice routing around a block f (Raposo et al. 2024, arXiv 2404.02258, eq. 1). In every row of T tokens

    ``y_i = x_i + w_i (f(x)_i - x_i)`` for the ``k = max(1, round(capacity T))`` tokens with the highest scores
    ``s_i = W_r norm(x_i) + b``, and ``y_i = x_i`` for the others,

    with ``w_i = weight_offset + weight_scale g(s_i)``: what is weighted is what the block adds, never the stream. f
    runs on the k tokens alone, which keep their positions and documents and see only each other. Documents that share a
    row compete for its k places: which of a document's tokens run depends on what it is packed with, and nothing else.

    To be among the k of a row depends on later tokens, which no decoder has. So each token also has a decision of its
    own, ``d_i > 0``, learned by cross entropy against being among the k (section 3.5 of the paper, both ways): from the
    score itself, or from a small network on the score and what the router reads, whose gradient ends there. With a
    cache, that decision alone counts, for prompts as for single tokens: the cache has room for ``(1 + slack) capacity
    length`` tokens and 32 more, and once that many of a row have run, the rest pass by.

    Attributes:
        capacity: share of tokens that run, above 0 and at most 1.
        every: the rule holds for one layer in so many that have the block, the last of each such group; `capacity` then
            varies over those layers.
        weight: g: ``identity`` as in the paper, ``sigmoid``, ``tanh``, or ``none``, which has ``w_i = 1``.
        weight_scale, weight_offset: see above. p-MoD's TanhNorm (Zhang et al. 2024, arXiv 2412.04449) is ``tanh`` with
            scale 0.2 and offset 1.
        symmetric: whether tokens that pass by are weighted too, ``y_i = (1 + weight_scale g(s_i)) x_i`` (p-MoD's
            symmetric token reweighting), so that their scores have a gradient.
        decide: ``predictor``, a network of its own, or ``router``, the score.
        decision_loss: weight of that cross entropy, per token and layer.
        predictor_hidden: hidden units of the predictor.
        selection: of rows without a cache: ``top_k`` as above, or ``causal`` as when decoding a row of that length.
        slack: room in the cache, see above.
        kept_tokens: first tokens of each document that always run, ahead of all scores, and have no part in the loss
            (masked routing, as gamma-MoD has it for instructions; Luo et al. 2024, arXiv 2410.13859).
        norm: of what router and predictor read; null reads the stream as it is, as in the paper.
    """

    chooses: ClassVar[bool] = True
    kind: Literal["mixture_of_depths"] = "mixture_of_depths"
    capacity: PerLayer[Capacity] = 0.125
    every: Count = 1
    weight: Literal["identity", "sigmoid", "tanh", "none"] = "sigmoid"
    weight_scale: Positive = 1.0
    weight_offset: Real = 0.0
    symmetric: bool = False
    decide: Literal["predictor", "router"] = "predictor"
    decision_loss: Annotated[Real, Field(ge=0)] = 0.01
    predictor_hidden: Count = 64
    selection: Selection = "top_k"
    slack: Annotated[Real, Field(ge=0)] = 0.25
    kept_tokens: Natural = 0
    norm: OneOf[NormSpec] | None = RMSNormSpec()

    def at(self, index: int, count: int) -> "MixtureOfDepthsSpec | None":
        """The rule of layer `index` of `count`; None where it does not hold.

        Raises:
            ConfigError: no layer is left, or a list has another length than there are layers with the rule.
        """
        held = count // self.every
        if not held:
            raise ConfigError(f"depth.every: {self.every}, but only {count} layers have the block: at most {count}")
        if index % self.every != self.every - 1:
            return None
        return super().at(index // self.every, held).model_copy(update={"every": 1})

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        if not 0 < self.capacity <= 1:
            yield "capacity", f"{self.capacity:g} is outside (0, 1]; bound the schedule by 'least' and 'most'"
        if self.weight == "none" and self.symmetric:
            yield "symmetric", "weight: none weights nothing, passing tokens neither; choose another weight"
        if self.weight == "none" and (self.decide != "router" or not self.decision_loss):
            yield "weight", "none gives the router no gradient but that of decide: router with a decision_loss"

    def mixer_faults(self, mixer: MixerSpec | None) -> Iterator[str]:
        if mixer is not None and mixer.bidirectional:
            yield f"'{mixer.kind}' sees later tokens, and which of those run is not known; choose a causal mixer"
        if mixer is not None and mixer.needs_every_token:
            yield f"'{mixer.kind}' counts on neighbouring tokens, and most of them pass by; choose another mixer"

    def decided(self, selection: Selection) -> "MixtureOfDepthsSpec":
        return self.model_copy(update={"selection": selection})

    def build(self, width: int, init: Initialization) -> nnx.Module:
        return MixtureOfDepths(self, width, init)

    def places(self, time: int) -> int:
        """Tokens of a row of `time` that run, by their scores."""
        return max(1, round(self.capacity * time))

    def budget(self, length: int) -> int:
        """Tokens that run at most, by decisions of their own, of a row of `length`."""
        return min(length, math.ceil((1 + self.slack) * self.capacity * length) + self.kept_tokens + SPARE)

    def flops_per_token(self, width: int, block: Callable[[float], float], context_length: float) -> float:
        """Router and predictor for every token; for its share, the block among as many tokens as run."""
        count = (self.places if self.selection == "top_k" else self.budget)(round(context_length))
        predictor = 2.0 * (self.predictor_hidden * (width + 1) + 1) if self.decide == "predictor" else 0.0
        return 2.0 * width + predictor + count / context_length * block(count)


class Predictor(nnx.Module):
    """``a s + w · silu(W x + b) + c`` of the router's score s and what it reads, in float32.

    It begins as the score itself (w and c at zero, a at one): what is left to learn is where the row's k end.
    """

    def __init__(self, width: int, hidden: int, init: Initialization):
        self.up = Linear({"embed": width}, {"predictor": hidden}, init=init, bias=True)
        self.down = Score({"predictor": hidden}, ZEROS)
        self.gain = parameter({}, ONES)

    def __call__(self, x: jax.Array, scores: jax.Array) -> jax.Array:
        """float32 `x [batch, time, width]` and `scores [batch, time]` → ``[batch, time]``."""
        return self.gain[...] * scores + self.down(jax.nn.silu(self.up(x)))


class Score(nnx.Module):
    """``w · x + b``, in float32; not decayed."""

    def __init__(self, axes: dict[str, int], start: Initializer):
        self.weight = parameter(axes, start, sums=tuple(range(len(axes))))
        self.bias = parameter({}, ZEROS)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 `x [batch, time, size]` → ``[batch, time]``."""
        return x @ self.weight[...] + self.bias[...]


class MixtureOfDepths(nnx.Module):
    def __init__(self, spec: MixtureOfDepthsSpec, width: int, init: Initialization):
        self.spec = spec
        self.norm = spec.norm and spec.norm.build(width)
        self.router = Score({"embed": width}, init.matrix(width))
        learned = spec.decide == "predictor"
        self.predictor = Predictor(width, spec.predictor_hidden, init) if learned else None

    def __call__(
        self, run: Run, x: jax.Array, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None, Auxiliary]:
        """`x [batch, time, width]` → the same shape and dtype, the cache with the tokens that ran, auxiliaries.

        Observed: `depth_share`, of the real tokens that decide to run; without a cache `depth_accuracy`, of those whose
        decision is whether they are among the row's k; and, where asked for, `ran`.
        """
        time, real = x.shape[1], context.segment_ids != 0
        scores, decisions = self._read(x)
        kept = real & (context.positions < self.spec.kept_tokens)
        wanted = real & (kept | (decisions > 0))
        auxiliary = Auxiliary({}, {"depth_share": _mean(wanted, real)})
        if cache is None:
            ranked = highest(jnp.where(kept, jnp.inf, scores), self.spec.places(time), real)
            auxiliary = auxiliary.merged(self._judged(decisions, wanted, ranked.mask(time), real, kept))
        if cache is None and self.spec.selection == "top_k":
            chosen, inner = ranked, ranked.context(context, context.packed)
        else:
            chosen = self._within_budget(wanted, cache)
            inner = chosen.context(context, packed=True)
        part = chosen.take(x)
        held = None if cache is None else cache["block"]
        y, held, more = run_if_any(run, part, inner, held, jnp.any(chosen.live))
        if cache is not None:
            cache = cache | {"block": held, "left": cache["left"] - jnp.sum(chosen.live, axis=1, dtype=jnp.int32)}
        if context.record:
            auxiliary.observed["ran"] = chosen.mask(time)
            more = more._replace(observed=_spread(more.observed, chosen, time))
        return self._combined(x, part, y, scores, real, chosen), cache, auxiliary.merged(more)

    def _read(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scores and decisions, float32 ``[batch, time]``."""
        x = x.astype(jnp.float32)
        x = x if self.norm is None else self.norm(x)
        scores = self.router(x)
        decided = scores if self.predictor is None else self.predictor(*jax.lax.stop_gradient((x, scores)))
        return scores, decided

    def _judged(
        self, decisions: jax.Array, wanted: jax.Array, members: jax.Array, real: jax.Array, kept: jax.Array
    ) -> Auxiliary:
        """How decisions fit being among the row's k: the loss that teaches them, and how many do."""
        observed = {"depth_accuracy": _mean(wanted == members, real)}
        if not self.spec.decision_loss:
            return Auxiliary({}, observed)
        entropies = jax.nn.softplus(decisions) - jnp.where(members, decisions, 0.0)
        return Auxiliary({"depth_router": self.spec.decision_loss * _mean(entropies, real & ~kept)}, observed)

    def _within_budget(self, wanted: jax.Array, cache: Cache | None) -> Selected:
        """The wanted tokens, in order, until as many have run as there is room for."""
        time = wanted.shape[1]
        room = self.spec.budget(time) if cache is None else cache["room"].shape[1]
        left = room if cache is None else cache["left"][:, None]
        return first(wanted & (jnp.cumsum(wanted, axis=1) <= left), min(room, time))

    def _combined(
        self, x: jax.Array, part: jax.Array, y: jax.Array, scores: jax.Array, real: jax.Array, chosen: Selected
    ) -> jax.Array:
        """The stream behind the block: what it makes of the chosen tokens weighted, the others as they pass by."""
        passing, spec = x, self.spec
        if spec.weight != "none":
            change = spec.weight_scale * WEIGHTS[spec.weight](scores)[..., None]
            if spec.symmetric:
                factor = 1.0 + jnp.where(real[..., None], change, 0.0)
                passing = (x.astype(jnp.float32) * factor).astype(x.dtype)
            stream, weight = part.astype(jnp.float32), spec.weight_offset + chosen.take(change)
            y = (stream + weight * (y.astype(jnp.float32) - stream)).astype(x.dtype)
        return chosen.put(passing, jnp.where(chosen.live[..., None], y, chosen.take(passing)))

    def init_cache(
        self, empty: Callable[..., Cache | None], batch: int, length: int, dtype: jax.typing.DTypeLike
    ) -> Cache:
        """The block's empty cache for as many tokens as may run of `length`, and how many are left.

        `room` holds no values: its shape says how many there were at first.
        """
        count = self.spec.budget(length)
        left, room = jnp.full((batch,), count, jnp.int32), jnp.zeros((batch, count, 0), bool)
        return {"block": empty(batch, count, dtype), "left": left, "room": room}


def _spread(observed: dict[str, jax.Array], chosen: Selected, time: int) -> dict[str, jax.Array]:
    """What the block recorded of its tokens, over whole rows; figures of the layer as they are."""
    places = chosen.live.shape
    return {
        name: chosen.spread(name, values, time) if values.shape[:2] == places else values
        for name, values in observed.items()
    }


def _mean(values: jax.Array, counted: jax.Array) -> jax.Array:
    """Over the counted tokens, a float32 scalar."""
    return jnp.sum(jnp.where(counted, values, 0), dtype=jnp.float32) / jnp.maximum(jnp.sum(counted), 1)
