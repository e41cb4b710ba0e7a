"""Multi-head latent attention: keys and values are read from one small latent vector per token."""

import math
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from efficient_lm.models.context import Context
from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.layers.norms import NormSpec, RMSNormSpec
from efficient_lm.models.layers.positions import PositionSpec, RotarySpec
from efficient_lm.models.mixers.attention import mean_entropy
from efficient_lm.models.mixers.base import Cache, MixerSpec, dividing
from efficient_lm.models.mixers.token_cache import TokenCache, mean_seen, memory_faults, places, rows
from efficient_lm.models.parameters import ZEROS, Initialization, parameter
from efficient_lm.spec import Count, Natural, OneOf, PerLayer, Positive, Real
from kernels_pallas.attention import attention, attention_weights

HEAD_SIZE = 128
"""Values per head where neither their number nor their size is given."""


class MultiLatentSpec(MixerSpec):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1, eq. 37 to 47).

    ``c = norm(W_c x)``, per head ``k = [W_k c; R(W_r x)]``, ``v = W_v c`` and ``q = [W_q x; R(W_s x)]``, then softmax
    attention; R turns by position, and its key is one for all heads. With `query_rank`, queries are read from
    ``norm(W_d x)`` instead of x.

    The cache holds c and ``R(W_r x)``: ``latent_size + rotary_size`` values per token, where attention holds
    ``2 * heads * head_size``. Decoding never makes keys or values of cached tokens: W_k is applied to the query and
    W_v to the weighted mean of latents (section 2.1.2): ``2 * heads * (2 * latent_size + rotary_size)`` FLOPs per
    token seen.

    Attributes:
        heads: None has as many as `head_size` (128, unless given) goes into the width.
        head_size: values of each head's queries and keys that do not turn; None takes ``width / heads``.
        rotary_size: values that turn, besides these; None takes half of `head_size`, an even number.
        value_size: values per head; None takes `head_size`.
        latent_size: of c; None takes four times `head_size`.
        query_rank: of the queries' latent; None has none.
        norm: of the latents.
        window, kept_tokens, sink_logit: as in attention.
        scale: factor of the logits; None takes ``(head_size + rotary_size) ** -0.5``.
        mscale: where positions are scaled by a factor s > 1, logits are also multiplied by
            ``(0.1 * mscale * ln s + 1) ** 2`` (DeepSeek-V3's `mscale_all_dim`).
        bias, output_bias: biases of the maps to the latents (and to the turning key), and of the output map.
        position: how order is known; it acts on the values that turn.
        implementation: which form of `kernels_pallas.attention` computes it.
    """

    kind: Literal["multi_latent"] = "multi_latent"
    heads: PerLayer[Count | None] = None
    head_size: Count | None = None
    rotary_size: Count | None = None
    value_size: Count | None = None
    latent_size: Count | None = None
    query_rank: Count | None = None
    norm: OneOf[NormSpec] = RMSNormSpec()
    window: PerLayer[Count | None] = None
    kept_tokens: Natural = 0
    sink_logit: bool = False
    scale: PerLayer[Positive | None] = None
    mscale: Real = 0.0
    bias: bool = False
    output_bias: bool = False
    position: OneOf[PositionSpec] = RotarySpec()
    implementation: Literal["auto", "reference", "xla", "pallas", "cudnn"] = "auto"

    @property
    def takes_back(self) -> bool:
        return self.window is None

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        sizes = self.resolved(width)
        if self.head_size is None and width % sizes.heads:
            near = dividing(width, sizes.heads)
            yield "heads", f"{sizes.heads} heads do not divide width {width}; {near}, or set head_size"
        yield from memory_faults(self.window, self.kept_tokens)
        if isinstance(self.position, RotarySpec) and sizes.rotary_size % 2:
            yield "rotary_size", f"rotary positions turn pairs of values, and {sizes.rotary_size} is odd"

    def resolved(self, width: int) -> "MultiLatentSpec":
        heads = self.heads or max(1, width // (self.head_size or HEAD_SIZE))
        size = self.head_size or max(1, width // heads)
        sizes = {
            "heads": heads, "head_size": size, "rotary_size": self.rotary_size or max(2, size // 4 * 2),
            "value_size": self.value_size or size, "latent_size": self.latent_size or 4 * size,
        }  # fmt: skip
        return self.model_copy(update=sizes)

    def logit_scale(self) -> float:
        """Factor of the logits; the sizes must be resolved."""
        scale = self.scale or (self.head_size + self.rotary_size) ** -0.5
        scaling = getattr(self.position, "scaling", None)
        factor = max(scaling.factor, 1.0) if scaling else 1.0
        return scale * (0.1 * self.mscale * math.log(factor) + 1.0) ** 2

    def held_to(self, base: "MultiLatentSpec", width: int, base_width: int) -> "MultiLatentSpec":
        size, its = (spec.head_size + spec.rotary_size for spec in (self.resolved(width), base.resolved(base_width)))
        return self if size == its else self.model_copy(update={"scale": (base.scale or its**-0.5) * (its / size)})

    def counted(self) -> dict[str, tuple[str, ...]]:
        return {"heads": ("heads",), "rank": ("latent_size",)}

    def build(self, width: int, init: Initialization) -> nnx.Module:
        return MultiLatent(self, width, init)

    def flops_per_token(self, width: int, context_length: int) -> float:
        """Maps and attention in the form of training, with keys and values made of the latents."""
        sizes = self.resolved(width)
        query, latent = sizes.heads * (sizes.head_size + sizes.rotary_size), sizes.latent_size
        rank, values = sizes.query_rank, sizes.heads * sizes.value_size
        maps = width * (latent + sizes.rotary_size + values) + latent * (sizes.heads * sizes.head_size + values)
        maps += width * query if rank is None else rank * (width + query)
        seen = mean_seen(context_length, sizes.window, sizes.kept_tokens)
        return 2.0 * maps + 2.0 * (query + values) * seen


class MultiLatent(nnx.Module):
    def __init__(self, spec: MultiLatentSpec, width: int, init: Initialization):
        self.spec = spec = spec.resolved(width)
        embed, rank = {"embed": width}, {"rank": spec.latent_size}
        query = {"heads": spec.heads, "head_dim": spec.head_size + spec.rotary_size}
        values = {"heads": spec.heads, "head_dim": spec.value_size}
        if spec.query_rank is None:
            self.query = Linear(embed, query, init=init)
        else:
            source = {"query_rank": spec.query_rank}
            self.query_down = Linear(embed, source, init=init, bias=spec.bias)
            self.query_norm = spec.norm.build(source)
            self.query_up = Linear(source, query, init=init)
        self.latent = Linear(embed, rank, init=init, bias=spec.bias)
        self.rotary_key = Linear(embed, {"rotary": spec.rotary_size}, init=init, bias=spec.bias)
        self.latent_norm = spec.norm.build(rank)
        self.key = Linear(rank, {"heads": spec.heads, "head_dim": spec.head_size}, init=init)
        self.value = Linear(rank, values, init=init)
        self.output = Linear(values, embed, init=init, bias=spec.output_bias, residual=True)
        self.sinks = parameter({"heads": spec.heads}, ZEROS) if spec.sink_logit else None
        self.position = spec.position.build(spec.heads, spec.rotary_size)
        self.memory = TokenCache(spec.window, spec.kept_tokens)

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """`x [batch, time, width]` → the same shape and dtype, and the cache with these tokens added."""
        q, latent = self._queries(x, context), self._latents(x, context)
        if context.mode != "decode":
            y = self._attend_rows(q, latent, context)
            cache = None if cache is None else self.memory.remember(cache, context, latent=latent)
        else:
            y, cache = self._attend_cache(q, latent, context, cache)
        return self.output(checkpoint_name(y, "attended")), cache

    def _queries(self, x: jax.Array, context: Context) -> jax.Array:
        """``[batch, time, heads, head_size + rotary_size]``, what turns last."""
        direct = self.spec.query_rank is None
        q = self.query(x) if direct else self.query_up(self.query_norm(self.query_down(x)))
        still, turning = jnp.split(q, [self.spec.head_size], axis=-1)
        turned = self.position.rotate(turning, context.positions)
        return checkpoint_name(jnp.concatenate([still, turned], axis=-1), "query")

    def _latents(self, x: jax.Array, context: Context) -> jax.Array:
        """``[batch, time, 1, latent_size + rotary_size]``: all that keys and values are made of."""
        turned = self.position.rotate(self.rotary_key(x)[:, :, None], context.positions)
        return jnp.concatenate([self.latent_norm(self.latent(x))[:, :, None], turned], axis=-1)

    def _keys(self, latent: jax.Array) -> jax.Array:
        """``[batch, time, heads, head_size + rotary_size]``."""
        source, turned = jnp.split(latent, [self.spec.latent_size], axis=-1)
        still = self.key(source[:, :, 0])
        shared = jnp.broadcast_to(turned, (*still.shape[:3], turned.shape[-1]))
        return checkpoint_name(jnp.concatenate([still, shared], axis=-1), "key")

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, **masks: jax.Array | None
    ) -> jax.Array:
        spec = self.spec
        sinks = None if self.sinks is None else self.sinks[...]
        return attention(
            q, k, v, window=spec.window, kept=spec.kept_tokens, sinks=sinks, scale=spec.logit_scale(), bias=bias,
            implementation=spec.implementation, **masks,
        )  # fmt: skip

    def _attend_rows(self, q: jax.Array, latent: jax.Array, context: Context) -> jax.Array:
        """Without a cache, keys and values are made of the latents; rows are in order."""
        where, masks = rows(context, self.spec.window)
        v = checkpoint_name(self.value(latent[:, :, 0, : self.spec.latent_size]), "value")
        return self._attend(q, self._keys(latent), v, self.position.bias(where, where), **masks)

    def _attend_cache(self, q: jax.Array, latent: jax.Array, context: Context, cache: Cache) -> tuple[jax.Array, Cache]:
        """From the cache, the heads look at the latents themselves: one head of keys and values for all."""
        size, new = self.spec.latent_size, self.memory.remember(cache, context, latent=latent)
        seen = self.memory.visible(cache, new, context, latent=latent)
        still, turned = jnp.split(q, [self.spec.head_size], axis=-1)
        absorbed = jnp.einsum("bthd,rhd->bthr", still, self.key.weight[...].astype(q.dtype))
        keys, bias = seen["latent"].astype(q.dtype), self.position.bias(context.positions, seen["positions"])
        queries = jnp.concatenate([absorbed, turned], axis=-1)
        y = self._attend(queries, keys, keys[..., :size], bias, **places(context, seen))
        return jnp.einsum("bthr,rhv->bthv", y, self.value.weight[...].astype(q.dtype)), new

    def entropy(self, x: jax.Array, context: Context) -> jax.Array:
        """Mean entropy in nats of the weights of every real token, float32 ``[batch, heads]``; builds all weights."""
        return mean_entropy(self.weights(x, context), context)

    def weights(self, x: jax.Array, context: Context) -> jax.Array:
        """What each token attends to, float32 ``[batch, heads, time, time]``."""
        index = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        return attention_weights(
            self._queries(x, context), self._keys(self._latents(x, context)), window=self.spec.window,
            kept=self.spec.kept_tokens, sinks=None if self.sinks is None else self.sinks[...],
            scale=self.spec.logit_scale(), bias=self.position.bias(index, index), segment_ids=context.segment_ids,
        )  # fmt: skip

    def init_cache(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
        """An empty cache for `length` tokens; latents are `[batch, slots, 1, latent_size + rotary_size]`."""
        return self.memory.empty(batch, length, dtype, latent=(1, self.spec.latent_size + self.spec.rotary_size))
