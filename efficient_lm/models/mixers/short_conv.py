"""The gated short convolution of LFM2: a few tokens of memory, at the price of its projections."""

from typing import Literal

import jax
from flax import nnx

from efficient_lm.models.context import Context
from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.layers.short_convolution import ShortConvolution
from efficient_lm.models.mixers.base import Cache, MixerSpec
from efficient_lm.models.mixers.recurrent import Implementation, documents, empty, entering, leaving
from efficient_lm.models.parameters import Initialization
from efficient_lm.spec import Count, PerLayer


class ShortConvSpec(MixerSpec):
    """``W_o (C * convolution(B * u))`` with ``B, C, u = W_i x`` (Liquid AI 2025, LFM2, arXiv 2511.23404).

    Attributes:
        inner: channels of B, C and u; None takes the width.
        convolution: taps; a token sees itself and ``convolution - 1`` before it.
        bias: whether both maps and the convolution have biases.
        implementation: see `kernels_pallas.short_convolution`.
    """

    kind: Literal["short_conv"] = "short_conv"
    inner: PerLayer[Count | None] = None
    convolution: Count = 3
    bias: bool = False
    implementation: Implementation = "auto"

    def resolved(self, width: int) -> "ShortConvSpec":
        return self.model_copy(update={"inner": self.inner or width})

    def counted(self) -> dict[str, tuple[str, ...]]:
        return {"heads": ("inner",)}

    def build(self, width: int, init: Initialization) -> nnx.Module:
        return ShortConv(self, width, init)

    def flops_per_token(self, width: int, context_length: int) -> float:
        """Projections, the convolution and its two gates."""
        return 2.0 * (self.inner or width) * (4 * width + self.convolution + 1)


class ShortConv(nnx.Module):
    def __init__(self, spec: ShortConvSpec, width: int, init: Initialization):
        embed, inner = {"embed": width}, {"inner": spec.inner or width}
        self.branches = Linear(embed, {"branch": 3, **inner}, init=init, bias=spec.bias, batch=1)
        self.convolution = ShortConvolution(
            inner, spec.convolution, bias=spec.bias, activation="identity", implementation=spec.implementation
        )
        self.output = Linear(inner, embed, init=init, bias=spec.bias, residual=True)

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """`x [batch, time, width]` → the same shape and dtype, and the cache after these tokens."""
        start, branches = entering(cache, context), self.branches(x)
        before, after, u = (branches[..., index, :] for index in range(3))
        u, convolved = self.convolution(before * u, documents(context, cache), start.get("convolution"))
        return self.output(after * u), leaving(cache, context, convolution=convolved)

    def init_cache(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
        """The last inputs of the convolution, ``[batch, taps - 1, inner]``."""
        return empty(batch, convolution=self.convolution.empty(batch, dtype))
