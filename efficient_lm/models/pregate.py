"""A router in front of the layers: it knows where each token will go before any of them runs.

One small causal router, apart from the backbone and shared by all layers (Read-ME, Cai et al. 2024, section 3.2), reads
token embeddings and scores experts once. Every mixture of experts whose router is `pregated` then chooses by those
scores, so that batches can be formed, and experts fetched, ahead of the layers.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.models.block import BlockSpec
from efficient_lm.models.context import Context
from efficient_lm.models.ffns.dense import DenseSpec
from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.layers.norms import RMSNormSpec
from efficient_lm.models.mixers.base import Cache
from efficient_lm.models.parameters import Initialization
from efficient_lm.spec import Count, Spec


class PregateSpec(Spec):
    """The router in front of the layers.

    Attributes:
        experts: of every mixture of experts that reads its scores.
        width: of the router; null takes the model's.
        block: what the router mixes tokens with, a block of its own; null scores each token's embedding alone.
    """

    experts: Count
    width: Count | None = None
    block: BlockSpec | None = None

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        """What cannot work in front of a model of this width: pairs of (key, message)."""
        if self.block is None:
            return
        block = self.block.at(0, 1)
        yield from ((f"block.{key}", message) for key, message in block.faults(self.width or width))
        if block.mixer is not None and block.mixer.bidirectional:
            yield "block.mixer", f"'{block.mixer.kind}' sees later tokens, and the router is causal"
        if block.depth is not None:
            yield "block.depth", "the router scores every token: null is the only value"
        for name in ("streams", "layer_input"):
            if getattr(block, name) is not None:
                yield (
                    f"block.{name}",
                    "is for the model's layers, and the router is in front of them: null is the only value",
                )
        if block.mixer is not None and block.mixer.takes_keys:
            yield "block.mixer.shares_keys", "there is no layer before the router: false is the only value"
        if block.ffn is not None and not isinstance(block.ffn, DenseSpec):
            yield "block.ffn", f"the router has no routers of its own: take a dense kind, not '{block.ffn.kind}'"

    def build(self, width: int, init: Initialization) -> "Pregate":
        """The module, called as ``pregate(x, context, cache)``."""
        return Pregate(self, width, init)

    def flops_per_token(self, width: int, context_length: float) -> float:
        """Forward FLOPs for one token."""
        inner = self.width or width
        entry = 0.0 if inner == width else 2.0 * width * inner
        block = self.block.at(0, 1).flops_per_token(inner, context_length) if self.block else 0.0
        return entry + block + 2.0 * inner * self.experts


class Pregate(nnx.Module):
    def __init__(self, spec: PregateSpec, width: int, init: Initialization):
        inner = spec.width or width
        self.entry = None if inner == width else Linear({"embed": width}, {"inner": inner}, init=init)
        self.block = spec.block and spec.block.at(0, 1).resolved(inner).build(inner, init)
        self.norm = RMSNormSpec().build(inner)
        self.scores = Linear({"embed": inner}, {"experts": spec.experts}, init=init)

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """Embeddings `[batch, time, width]` → scores of experts, float32 `[batch, time, experts]`; the cache."""
        x = x if self.entry is None else self.entry(x)
        if self.block is not None:
            x, cache, _ = self.block(x, context, cache)
        return self.scores(self.norm(x.astype(jnp.float32))), cache

    def init_cache(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache | None:
        """The empty cache of the block; None without one."""
        return None if self.block is None else self.block.init_cache(batch, length, dtype)
