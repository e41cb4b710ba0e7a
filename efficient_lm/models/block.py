"""A block: a sequence mixer and a channel mixer, each with its norms and its way into the residual stream."""

from collections.abc import Iterator
from typing import Any, Literal

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import efficient_lm.models.ffns
import efficient_lm.models.mixers  # noqa: F401  (every kind of both folders registers itself)
from efficient_lm.models.context import Context
from efficient_lm.models.ffns.base import Auxiliary, FFNSpec
from efficient_lm.models.layers.norms import NormSpec, RMSNormSpec
from efficient_lm.models.mixers.base import Cache, MixerSpec
from efficient_lm.models.parameters import Initialization
from efficient_lm.spec import OneOf, Positive, Spec


class BlockSpec(Spec):
    """A residual block.

    Attributes:
        mixer, ffn: the two halves; either may be null, not both.
        norm: the norm at the place that `norm_position` names.
        norm_position: ``pre``: ``x + f(norm(x))``; ``post``: ``norm(x + f(x))`` (Vaswani et al. 2017);
            ``output``: ``x + norm(f(x))`` (OLMo 2); ``sandwich``: ``x + norm(f(norm(x)))`` (Gemma 2).
        residual: ``sequential`` runs the ffn on the mixer's result, ``parallel`` both on the same input (GPT-J, PaLM).
        shared_norm: with ``parallel``, one input norm for both halves.
        residual_multiplier: factor of both halves' outputs.
    """

    mixer: OneOf[MixerSpec] | None
    ffn: OneOf[FFNSpec] | None = None
    norm: OneOf[NormSpec] = RMSNormSpec()
    norm_position: Literal["pre", "post", "output", "sandwich"] = "pre"
    residual: Literal["sequential", "parallel"] = "sequential"
    shared_norm: bool = False
    residual_multiplier: Positive = 1.0

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        """What cannot work in a model of this width: pairs of (key, message)."""
        if self.mixer is None and self.ffn is None:
            yield "mixer", "a block needs a mixer or an ffn"
        if self.shared_norm and (self.residual != "parallel" or self.norm_position not in ("pre", "sandwich")):
            yield "shared_norm", "needs residual: parallel and norm_position: pre or sandwich"
        for name, half in (("mixer", self.mixer), ("ffn", self.ffn)):
            if half is not None:
                yield from ((f"{name}.{key}", message) for key, message in half.faults(width))

    def resolved(self, width: int) -> "BlockSpec":
        """The same with every size that follows from the width filled in."""
        halves = {"mixer": self.mixer, "ffn": self.ffn}
        return self.model_copy(update={name: half and half.resolved(width) for name, half in halves.items()})

    def build(self, width: int, init: Initialization) -> "Block":
        return Block(self, width, init)

    def flops_per_token(self, width: int, context_length: int) -> float:
        """Forward FLOPs of the matrices and the mixer for one token."""
        mixer = self.mixer.flops_per_token(width, context_length) if self.mixer else 0.0
        return mixer + (self.ffn.flops_per_token(width) if self.ffn else 0.0)


class Half(nnx.Module):
    """One half of a block with its norms: `inner(x, *rest) -> (y, extra)`."""

    def __init__(self, inner: nnx.Module, spec: BlockSpec, width: int, input_norm: bool):
        def norm(*places: str) -> nnx.Module | None:
            return spec.norm.build(width) if spec.norm_position in places else None

        self.inner, self.multiplier = inner, spec.residual_multiplier
        self.input_norm = norm("pre", "sandwich") if input_norm else None
        self.output_norm = norm("output", "sandwich")

    def __call__(self, x: jax.Array, *rest: Any) -> tuple[jax.Array, Any]:
        """What this half adds to the residual stream `x [batch, time, width]`, and its extra result."""
        y, extra = self.inner(_normed(self.input_norm, x), *rest)
        y = _normed(self.output_norm, y)
        return y if self.multiplier == 1.0 else y * self.multiplier, extra


class Block(nnx.Module):
    def __init__(self, spec: BlockSpec, width: int, init: Initialization):
        self.parallel = spec.residual == "parallel"

        def half(part: MixerSpec | FFNSpec | None) -> Half | None:
            inner = part and part.build(width, init)
            return inner and Half(inner, spec, width, input_norm=not spec.shared_norm)

        def post_norm(wanted: object) -> nnx.Module | None:
            return spec.norm.build(width) if spec.norm_position == "post" and wanted else None

        self.mixer, self.ffn = half(spec.mixer), half(spec.ffn)
        self.shared_norm = spec.norm.build(width) if spec.shared_norm else None
        self.mixer_norm = post_norm(spec.mixer and not self.parallel)
        self.ffn_norm = post_norm(spec.ffn and not self.parallel)
        self.joint_norm = post_norm(self.parallel)

    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None, Auxiliary]:
        """`x [batch, time, width]` → the same shape and dtype, the cache with these tokens added, auxiliary scalars."""
        run = self._parallel if self.parallel else self._sequential
        return run(x, context, cache)

    def _sequential(
        self, x: jax.Array, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None, Auxiliary]:
        auxiliary: Auxiliary = {}
        if self.mixer is not None:
            y, cache = self.mixer(x, context, cache)
            x = _normed(self.mixer_norm, x + checkpoint_name(y, "mixer_output"))
        if self.ffn is not None:
            y, auxiliary = self.ffn(x, context)
            x = _normed(self.ffn_norm, x + checkpoint_name(y, "ffn_output"))
        return x, cache, auxiliary

    def _parallel(
        self, x: jax.Array, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None, Auxiliary]:
        auxiliary: Auxiliary = {}
        source, total = _normed(self.shared_norm, x), x
        if self.mixer is not None:
            y, cache = self.mixer(source, context, cache)
            total = total + checkpoint_name(y, "mixer_output")
        if self.ffn is not None:
            y, auxiliary = self.ffn(source, context)
            total = total + checkpoint_name(y, "ffn_output")
        return _normed(self.joint_norm, total), cache, auxiliary

    def mixer_input(self, x: jax.Array) -> jax.Array:
        """What the mixer reads of the residual stream `x [batch, time, width]`."""
        return _normed(self.mixer.input_norm, _normed(self.shared_norm, x))

    def init_cache(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache | None:
        """The mixer's empty cache."""
        return None if self.mixer is None else self.mixer.inner.init_cache(batch, length, dtype)


def _normed(norm: nnx.Module | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


REMAT_NAMES = ("attended", "query", "key", "value", "ffn_hidden", "mixer_output", "ffn_output")
"""Values that rematerialisation can be told to save by name."""
