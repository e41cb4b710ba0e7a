"""A block: a sequence mixer and a channel mixer, each with its norms and its way into the residual stream.

A depth rule, where there is one, decides which tokens run it. Where there are several residual streams, the halves run
on one that is made of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from pydantic import field_validator

import efficient_lm.models.depth
import efficient_lm.models.ffns
import efficient_lm.models.mixers
import efficient_lm.models.streams  # noqa: F401  (every kind of these folders registers itself)
from efficient_lm.models.auxiliary import Auxiliary
from efficient_lm.models.context import Context
from efficient_lm.models.depth.base import DepthSpec
from efficient_lm.models.depth.none import NoDepthSpec
from efficient_lm.models.ffns.base import FFNSpec
from efficient_lm.models.layer_embedding import LayerInputSpec
from efficient_lm.models.layers.laurel import LaurelSpec
from efficient_lm.models.layers.linear import scaled
from efficient_lm.models.layers.norms import NormSpec, RMSNormSpec
from efficient_lm.models.mixers.base import Cache, Handed, MixerSpec
from efficient_lm.models.parameters import Initialization, Parameters
from efficient_lm.models.streams.base import StreamsSpec
from efficient_lm.models.traversal import Passage, Runs
from efficient_lm.spec import OneOf, Positive, Spec


class Halves(Spec):
    """A factor for each half of a block."""

    mixer: Positive = 1.0
    ffn: Positive = 1.0


class BlockSpec(Spec):
    """A residual block.

    Attributes:
        mixer, ffn: the two halves; either may be null, not both.
        depth: which tokens run the block; null: all.
        norm: the norm at the place that `norm_position` names.
        norm_position: ``pre``: ``x + f(norm(x))``; ``post``: ``norm(x + f(x))`` (Vaswani et al. 2017);
            ``output``: ``x + norm(f(x))`` (OLMo 2); ``sandwich``: ``x + norm(f(norm(x)))`` (Gemma 2);
            ``stream``: ``norm(x) + f(norm(x))`` (MiniMax-01).
        residual: ``sequential`` runs the ffn on the mixer's result, ``parallel`` both on the same input (GPT-J, PaLM).
        shared_norm: with ``parallel``, one input norm for both halves.
        residual_multiplier: factor of the halves' outputs, one for both or one for each.
        stream_multiplier: factor of what a half's output is added to, one for both or one for each (DeepNorm, Wang et
            al. 2022, with ``post``).
        laurel: a path of low rank beside the mixer; null: none.
        layer_input: what is done with the layer's own embedding of each token, which `model.layer_embedding` makes;
            null: nothing.
        streams: several residual streams beside each other, in all blocks alike; null: one.
    """

    mixer: OneOf[MixerSpec] | None
    ffn: OneOf[FFNSpec] | None = None
    depth: OneOf[DepthSpec] | None = None
    norm: OneOf[NormSpec] = RMSNormSpec()
    norm_position: Literal["pre", "post", "output", "sandwich", "stream"] = "pre"
    residual: Literal["sequential", "parallel"] = "sequential"
    shared_norm: bool = False
    residual_multiplier: Positive | Halves = 1.0
    stream_multiplier: Positive | Halves = 1.0
    laurel: LaurelSpec | None = None
    layer_input: LayerInputSpec | None = None
    streams: OneOf[StreamsSpec] | None = None

    @field_validator("depth")
    @classmethod
    def _none_is_no_rule(cls, depth: DepthSpec | None) -> DepthSpec | None:
        return None if isinstance(depth, NoDepthSpec) else depth

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        """What cannot work in a model of this width: pairs of (key, message)."""
        if self.mixer is None and self.ffn is None:
            yield "mixer", "a block needs a mixer or an ffn"
        if self.shared_norm and (self.residual != "parallel" or self.norm_position not in ("pre", "sandwich")):
            yield "shared_norm", "needs residual: parallel and norm_position: pre or sandwich"
        if self.residual == "parallel" and self.norm_position == "stream":
            yield "norm_position", "stream needs residual: sequential, for parallel halves share one stream"
        if self.residual == "parallel" and isinstance(self.stream_multiplier, Halves):
            yield "stream_multiplier", "parallel halves share one stream: give one factor"
        if self.depth is not None:
            yield from (
                ("mixer", f"depth '{self.depth.kind}': {fault}") for fault in self.depth.mixer_faults(self.mixer)
            )
        if self.laurel is not None and (self.mixer is None or self.residual == "parallel"):
            yield "laurel", "is a path beside the mixer, and needs one, and residual: sequential"
        for name in ("streams", "layer_input"):
            if self.depth is not None and getattr(self, name) is not None:
                yield "depth", f"a rule chooses tokens of one stream, and does not stack with {name}: drop one of them"
        for name, part in (self._parts | {"streams": self.streams}).items():
            if part is not None:
                yield from ((f"{name}.{key}", message) for key, message in part.faults(width))

    def resolved(self, width: int) -> "BlockSpec":
        """The same with every size that follows from the width filled in."""
        changes = {name: part and part.resolved(width) for name, part in self._parts.items()}
        for name in ("residual_multiplier", "stream_multiplier"):
            factors = factors_of(getattr(self, name))
            changes[name] = factors.mixer if factors.mixer == factors.ffn else factors
        return self.model_copy(update=changes)

    def axis_sizes(self) -> dict[str, dict[str, int]]:
        """Of a resolved spec, by half, how many units each elastic axis has (see `models.elastic`)."""
        return {name: part.axis_sizes() for name, part in self._parts.items() if name != "depth" and part is not None}

    def cut(self, width: int, units: Mapping[str, Mapping[str, int]]) -> "BlockSpec":
        """Of a resolved spec, the same in a model of this width, with so many units of axes of its halves."""
        halves = {
            name: part.cut(units.get(name, {})) for name, part in self._parts.items() if name in self.axis_sizes()
        }
        return self.model_copy(update=halves).resolved(width)

    @property
    def _parts(self) -> dict[str, MixerSpec | FFNSpec | DepthSpec | None]:
        return {"mixer": self.mixer, "ffn": self.ffn, "depth": self.depth}

    def build(self, width: int, init: Initialization) -> "Block":
        return Block(self, width, init)

    def corrected(self, params: Parameters, counts: dict[str, jax.Array]) -> Parameters:
        """A layer's parameters, moved by what its tokens were counted to do (see `FFNSpec.corrected`)."""
        if self.ffn is None or not counts:
            return params
        half = params["ffn"] | {"inner": self.ffn.corrected(params["ffn"]["inner"], counts)}
        return params | {"ffn": half}

    def flops_per_token(self, width: int, context_length: int) -> float:
        """Forward FLOPs of the matrices and the mixer for one token; its share of them where a depth rule chooses."""

        def whole(context_length: float) -> float:
            ffn = self.ffn.flops_per_token(width) if self.ffn else 0.0
            return self.mixing_flops(width, context_length) + ffn + self.flops_beside(width)

        return whole(context_length) if self.depth is None else self.depth.flops_per_token(width, whole, context_length)

    def mixing_flops(self, width: int, context_length: float) -> float:
        """Forward FLOPs of the mixer and the path beside it for one token that runs them."""
        mixer = self.mixer.flops_per_token(width, context_length) if self.mixer else 0.0
        return mixer + (self.laurel.flops_per_token(width) if self.laurel else 0.0)

    def flops_beside(self, width: int) -> float:
        """Forward FLOPs for one token of what is in neither half."""
        return sum(part.flops_per_token(width) for part in (self.layer_input, self.streams) if part)


def factors_of(multiplier: float | Halves) -> Halves:
    """The factor of each half."""
    return multiplier if isinstance(multiplier, Halves) else Halves(mixer=multiplier, ffn=multiplier)


class Half(nnx.Module):
    """One half of a block with its norms: `inner(x, *rest) -> (y, extra)`."""

    def __init__(self, name: str, inner: nnx.Module, spec: BlockSpec, width: int):
        def norm(*places: str) -> nnx.Module | None:
            return spec.norm.build(width) if spec.norm_position in places else None

        self.inner = inner
        self.multiplier = getattr(factors_of(spec.residual_multiplier), name)
        self.stream_multiplier = getattr(factors_of(spec.stream_multiplier), name)
        self.stream_norm = norm("stream")
        self.input_norm = None if spec.shared_norm else norm("pre", "sandwich")
        self.output_norm = norm("output", "sandwich")

    def __call__(self, x: jax.Array, *rest: Any) -> tuple[jax.Array, Any]:
        """What this half adds to the residual stream `x [batch, time, width]`, and its extra result."""
        y, extra = self.inner(_normed(self.input_norm, x), *rest)
        return scaled(_normed(self.output_norm, y), self.multiplier), extra


class Block(nnx.Module):
    def __init__(self, spec: BlockSpec, width: int, init: Initialization):
        self.parallel = spec.residual == "parallel"

        def half(name: str) -> Half | None:
            part: MixerSpec | FFNSpec | None = getattr(spec, name)
            return part and Half(name, part.build(width, init), spec, width)

        def post_norm(wanted: object) -> nnx.Module | None:
            return spec.norm.build(width) if spec.norm_position == "post" and wanted else None

        self.mixer, self.ffn = half("mixer"), half("ffn")
        self.shared_norm = spec.norm.build(width) if spec.shared_norm else None
        self.mixer_norm = post_norm(spec.mixer and not self.parallel)
        self.ffn_norm = post_norm(spec.ffn and not self.parallel)
        self.joint_norm = post_norm(self.parallel)
        self.depth = spec.depth and spec.depth.build(width, init)
        self.laurel = spec.laurel and spec.laurel.build(width, spec.norm, init)
        self.layer_input = spec.layer_input and spec.layer_input.build(width, spec.norm, init)
        self.streams = spec.streams and spec.streams.build(width, init)

    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None, Auxiliary]:
        """`x [batch, time, width]` → the same shape and dtype, the cache with these tokens added, auxiliaries.

        With several streams `x` is ``[streams, batch, time, width]``.
        """
        run = self._parallel if self.parallel else self._sequential
        if self.depth is not None:
            return self.depth(run, x, context, cache)
        x, kept = (x, None) if self.streams is None else self.streams.read(x, context)
        x, cache, auxiliary = run(x, context, cache)
        x = x if self.streams is None else self.streams.write(kept, x, context)
        return self._with_layer_input(x, context), cache, auxiliary

    def _with_layer_input(self, x: jax.Array, context: Context) -> jax.Array:
        if self.layer_input is None:
            return x
        if self.streams is None:
            return x + self.layer_input(x, context.layer_inputs)
        return self.streams.added(x, lambda stream: self.layer_input(stream, context.layer_inputs))

    def _sequential(
        self, x: jax.Array, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None, Auxiliary]:
        auxiliary, shared = Auxiliary(), {}
        if self.mixer is not None:
            x, cache, shared = self._mixed(x, context, cache)
        if self.ffn is not None:
            x, auxiliary = self._channel_mixed(x, context)
        return x, cache, auxiliary._replace(shared=shared)

    def _mixed(
        self, x: jax.Array, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None, dict[str, Any]]:
        """The stream behind the mixer's half, its cache, and what it hands on."""
        x = _normed(self.mixer.stream_norm, x)
        y, cache, shared = self._mixer_half(x, context, cache)
        mixed = scaled(x, self.mixer.stream_multiplier) + checkpoint_name(y, "mixer_output")
        mixed = mixed if self.laurel is None else self.laurel(mixed, x, _normed(self.mixer.input_norm, x))
        return _normed(self.mixer_norm, mixed), cache, shared

    def _mixer_half(
        self, x: jax.Array, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None, dict[str, Any]]:
        y, cache = self.mixer(x, context, cache)
        return (y, *cache) if isinstance(cache, Handed) else (y, cache, {})

    def _channel_mixed(self, x: jax.Array, context: Context) -> tuple[jax.Array, Auxiliary]:
        """The stream behind the ffn's half, and its auxiliaries."""
        x = _normed(self.ffn.stream_norm, x)
        y, auxiliary = self.ffn(x, context)
        stream = scaled(x, self.ffn.stream_multiplier)
        return _normed(self.ffn_norm, stream + checkpoint_name(y, "ffn_output")), auxiliary

    def _parallel(
        self, x: jax.Array, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None, Auxiliary]:
        auxiliary, shared = Auxiliary(), {}
        source = _normed(self.shared_norm, x)
        total = scaled(x, (self.mixer or self.ffn).stream_multiplier)
        if self.mixer is not None:
            y, cache, shared = self._mixer_half(source, context, cache)
            total = total + checkpoint_name(y, "mixer_output")
        if self.ffn is not None:
            y, auxiliary = self.ffn(source, context)
            total = total + checkpoint_name(y, "ffn_output")
        return _normed(self.joint_norm, total), cache, auxiliary._replace(shared=shared)

    def gated(
        self, x: jax.Array, context: Context, cache: Cache | None, runs: Runs, keeps_cache: bool
    ) -> tuple[Passage, Cache | None, Auxiliary]:
        """As `__call__`, where `runs` says which tokens run which half; the stream of others goes past it unchanged.

        A half that no token runs is not computed, but for what `keeps_cache` has the mixer remember. The depth rule
        does not take part. Auxiliaries are ``mixer_ran`` and ``ffn_ran``, bool ``[batch, time]``.
        """
        run = self._gated_parallel if self.parallel else self._gated_sequential
        between, after, cache = run(x, context, cache, runs, keeps_cache)
        return Passage(x, between, after), cache, Auxiliary({}, {"mixer_ran": runs.mixer, "ffn_ran": runs.ffn})

    def _gated_sequential(
        self, x: jax.Array, context: Context, cache: Cache | None, runs: Runs, keeps_cache: bool
    ) -> tuple[jax.Array, jax.Array, Cache | None]:
        between, after = x, x
        if self.mixer is not None:

            def mix() -> tuple[jax.Array, Cache | None]:
                mixed, new, _ = self._mixed(x, context, cache)
                return _where(runs.mixer, mixed, x), new

            def pass_by() -> tuple[jax.Array, Cache | None]:
                # Of the mixer, what its cache does not need is dead code.
                return x, self._mixed(x, context, cache)[1] if keeps_cache else cache

            between, cache = lax.cond(jnp.any(runs.mixer), mix, pass_by)
        if self.ffn is not None:
            mine = _only(context, runs.ffn)
            after = lax.cond(
                jnp.any(runs.ffn),
                lambda: _where(runs.ffn, self._channel_mixed(between, mine)[0], between),
                lambda: between,
            )
        return between, between if self.ffn is None else after, cache

    def _gated_parallel(
        self, x: jax.Array, context: Context, cache: Cache | None, runs: Runs, keeps_cache: bool
    ) -> tuple[jax.Array, jax.Array, Cache | None]:
        source, zeros = _normed(self.shared_norm, x), jnp.zeros_like(x)
        stream, total = x, scaled(x, (self.mixer or self.ffn).stream_multiplier)
        if self.mixer is not None:

            def mix() -> tuple[jax.Array, Cache | None]:
                return self.mixer(source, context, cache)

            y, cache = lax.cond(jnp.any(runs.mixer), mix, lambda: (zeros, mix()[1] if keeps_cache else cache))
            total = total + _where(runs.mixer, y, zeros)
            stream = _where(runs.mixer, _normed(self.joint_norm, total), x)
        if self.ffn is None:
            return stream, stream, cache
        mine = _only(context, runs.ffn)
        y = lax.cond(jnp.any(runs.ffn), lambda: self.ffn(source, mine)[0], lambda: zeros)
        after = _normed(self.joint_norm, total + _where(runs.ffn, y, zeros))
        return stream, _where(runs.ffn, after, stream), cache

    def mixer_input(self, x: jax.Array, context: Context) -> jax.Array:
        """What the mixer reads of the residual stream, or streams, that the block is given."""
        x = x if self.streams is None else self.streams.read(x, context)[0]
        return _normed(self.mixer.input_norm, _normed(self.mixer.stream_norm, _normed(self.shared_norm, x)))

    def init_cache(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache | None:
        """The empty cache of the mixer, and of the depth rule."""

        def empty(batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache | None:
            return None if self.mixer is None else self.mixer.inner.init_cache(batch, length, dtype)

        return empty(batch, length, dtype) if self.depth is None else self.depth.init_cache(empty, batch, length, dtype)


def _normed(norm: nnx.Module | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


def _where(chosen: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` of the tokens that are `chosen [batch, time]`, `old` of the others."""
    return jnp.where(chosen[..., None], new, old)


def _only(context: Context, chosen: jax.Array) -> Context:
    """The context in which all other tokens are padding, so that they take no expert's room."""
    return replace(context, segment_ids=jnp.where(chosen, context.segment_ids, 0), packed=True)


REMAT_NAMES = ("attended", "query", "key", "value", "ffn_hidden", "mixer_output", "ffn_output")
"""Values that rematerialisation can be told to save by name."""
