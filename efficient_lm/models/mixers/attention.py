"""Softmax attention: multi-head, grouped-query and multi-query, with every option of the published decoder families."""

from collections.abc import Hashable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from efficient_lm.models.context import Context
from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.layers.norms import NormSpec
from efficient_lm.models.layers.positions import NoPositionSpec, PositionSpec, RotarySpec
from efficient_lm.models.mixers.base import Cache, Handed, MixerSpec, dividing
from efficient_lm.models.mixers.token_cache import TokenCache, mean_seen, memory_faults, places, rows, shown
from efficient_lm.models.parameters import ZEROS, Initialization, parameter
from efficient_lm.spec import Count, Natural, OneOf, PerLayer, Positive
from kernels_pallas.attention import attention, attention_weights
from kernels_pallas.decode_attention import decode_attention

HEAD_SIZE = 64
"""Values per head where neither their number nor their size is given."""


class AttentionSpec(MixerSpec):
    """``softmax(q kᵀ / sqrt(head_size)) v`` per head (Vaswani et al. 2017, eq. 1).

    Attributes:
        heads: query heads; None has as many as `head_size` (64, unless given) goes into the width.
        kv_heads: key-value heads; None has one per query head, 1 is multi-query (Shazeer 2019), between is grouped
            (Ainslie et al. 2023).
        head_size: values per head; None takes ``width / heads``, whatever `heads` is.
        window: tokens each token sees, itself included; None sees all.
        kept_tokens: first tokens of a document that stay visible beyond the window (Xiao et al. 2023, StreamingLLM).
        sink_logit: a learned logit per head in the softmax's denominator, so that a head may attend to nothing.
        softcap: bounds the logits by ``softcap * tanh(logit / softcap)`` (Gemma 2).
        scale: factor of the logits; None takes ``head_size ** -0.5``.
        qk_norm: norm of queries and keys, before rotation (Henry et al. 2020).
        qk_norm_over: ``head`` norms each head by itself, ``all`` every head's values together (OLMo 2).
        value_norm: norm of each head's values (Gemma 3n).
        clip: bounds the values of queries, keys and values, before rotation (DBRX, OLMo).
        output_gate: multiplies what each head attended to by ``sigmoid(W_g x)``, value by value (Qiu et al. 2025, arXiv
            2505.06708).
        bias, output_bias: biases of the query, key, value and gate maps, and of the output map.
        shares_keys: whether it takes the keys and values of the nearest layer before it that has its own and is alike
            (see `keys_alike`), and keeps none (cross-layer attention, Brandon et al. 2024, arXiv 2405.12981).
        position: how order is known.
        implementation: which form of `kernels_pallas.attention` computes it; with ``pallas`` single tokens are decoded
            by the kernel of `kernels_pallas.decode_attention`.
    """

    kind: Literal["attention"] = "attention"
    heads: PerLayer[Count | None] = None
    kv_heads: PerLayer[Count | None] = None
    head_size: Count | None = None
    window: PerLayer[Count | None] = None
    kept_tokens: Natural = 0
    sink_logit: bool = False
    softcap: Positive | None = None
    scale: PerLayer[Positive | None] = None
    qk_norm: OneOf[NormSpec] | None = None
    qk_norm_over: Literal["head", "all"] = "head"
    value_norm: OneOf[NormSpec] | None = None
    clip: Positive | None = None
    output_gate: bool = False
    bias: bool = False
    output_bias: bool = False
    shares_keys: bool = False
    position: OneOf[PositionSpec] = RotarySpec()
    implementation: Literal["auto", "reference", "xla", "pallas", "cudnn"] = "auto"

    @property
    def takes_back(self) -> bool:
        return self.window is None

    @property
    def takes_keys(self) -> bool:
        return self.shares_keys

    def with_own_keys(self) -> "AttentionSpec":
        return self.model_copy(update={"shares_keys": False})

    def keys_alike(self, width: int) -> Hashable | None:
        kv_heads = self.kv_heads or self.head_count(width)
        return self.kind, kv_heads, self.size_per_head(width), self.window, self.kept_tokens, self.position

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        heads = self.head_count(width)
        if self.head_size is None and width % heads:
            yield "heads", f"{heads} heads do not divide width {width}; {dividing(width, heads)}, or set head_size"
        if self.kv_heads and heads % self.kv_heads:
            yield "kv_heads", f"{self.kv_heads} do not divide {heads} heads; {dividing(heads, self.kv_heads)}"
        yield from memory_faults(self.window, self.kept_tokens)
        if self.qk_norm_over != "head" and self.qk_norm is None:
            yield "qk_norm_over", f"'{self.qk_norm_over}' says what qk_norm is over, and there is none: set qk_norm too"
        if self.shares_keys and self.value_norm is not None:
            yield "value_norm", "its values are an earlier layer's, and normed there: null is the only value"
        if isinstance(self.position, RotarySpec) and self.size_per_head(width) % 2:
            yield "head_size", f"rotary positions turn pairs of values, and {self.size_per_head(width)} is odd"

    def head_count(self, width: int) -> int:
        """Query heads in a model of this width."""
        return self.heads or max(1, width // (self.head_size or HEAD_SIZE))

    def size_per_head(self, width: int) -> int:
        """Values per head in a model of this width."""
        return self.head_size or width // self.head_count(width)

    def resolved(self, width: int) -> "AttentionSpec":
        heads = self.head_count(width)
        sizes = {"heads": heads, "kv_heads": self.kv_heads or heads, "head_size": self.size_per_head(width)}
        return self.model_copy(update=sizes)

    def held_to(self, base: "AttentionSpec", width: int, base_width: int) -> "AttentionSpec":
        size, its = self.size_per_head(width), base.size_per_head(base_width)
        return self if size == its else self.model_copy(update={"scale": (base.scale or its**-0.5) * (its / size)})

    def counted(self) -> dict[str, tuple[str, ...]]:
        # What is added to the logits depends on how many heads there are.
        turned = isinstance(self.position, RotarySpec | NoPositionSpec)
        return {"heads": ("kv_heads", "heads")} if turned else {}

    def build(self, width: int, init: Initialization) -> nnx.Module:
        return Attention(self, width, init)

    def flops_per_token(self, width: int, context_length: int) -> float:
        heads, size = self.head_count(width), self.size_per_head(width)
        own = 0 if self.shares_keys else 2 * (self.kv_heads or heads)
        maps = 2 * heads + own + (heads if self.output_gate else 0)
        seen = mean_seen(context_length, self.window, self.kept_tokens)
        return 2 * width * size * maps + 2 * heads * (size + self.value_size(width)) * seen

    def value_size(self, width: int) -> int:
        """Values that each query head gathers from every token it sees."""
        return self.size_per_head(width)


class Attention(nnx.Module):
    def __init__(self, spec: AttentionSpec, width: int, init: Initialization):
        self.spec, self.size = spec, spec.size_per_head(width)
        count = spec.head_count(width)
        self.kv_heads = spec.kv_heads or count
        embed, heads = {"embed": width}, {"heads": count, "head_dim": self.size}
        pair = {"key_value": 2, "kv_heads": self.kv_heads, "head_dim": self.size}
        self.query = Linear(embed, heads, init=init, bias=spec.bias)
        own = not spec.shares_keys
        self.key_value = Linear(embed, pair, init=init, bias=spec.bias, batch=1) if own else None
        self.output = Linear(heads, embed, init=init, bias=spec.output_bias, residual=True)
        self.query_norm = self._norm({"heads": count})
        self.key_norm = self._norm({"kv_heads": self.kv_heads}) if own else None
        self.value_norm = spec.value_norm and spec.value_norm.build({"head_dim": self.size})
        self.sinks = parameter({"heads": count}, ZEROS) if spec.sink_logit else None
        self.gate = Linear(embed, heads, init=init, bias=spec.bias) if spec.output_gate else None
        self.position = spec.position.build(count, self.size)
        self.memory = TokenCache(spec.window, spec.kept_tokens)

    def _norm(self, heads: dict[str, int]) -> nnx.Module | None:
        over = heads if self.spec.qk_norm_over == "all" else {}
        return self.spec.qk_norm and self.spec.qk_norm.build({**over, "head_dim": self.size})

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """`x [batch, time, width]` → the same shape and dtype, and the cache with these tokens added."""
        q = self._query(x, context)
        cache, seen = self._seen(x, context, cache)
        y = self._combine(self._look(q, seen, context), context)
        if self.gate is not None:
            y = (y * jax.nn.sigmoid(self.gate(x).astype(jnp.float32))).astype(y.dtype)
        y = self.output(checkpoint_name(y, "attended"))
        return y, Handed(cache, seen) if context.hands_on else cache

    def _query(self, x: jax.Array, context: Context) -> jax.Array:
        q = self.query(x)
        q = q if self.query_norm is None else self.query_norm(q)
        return checkpoint_name(self.position.rotate(self._clipped(q), context.positions), "query")

    def _key_value(self, x: jax.Array, context: Context) -> dict[str, jax.Array]:
        pair = self.key_value(x)
        k, v = pair[..., 0, :, :], pair[..., 1, :, :]
        k = self._clipped(k if self.key_norm is None else self.key_norm(k))
        v = self._clipped(v if self.value_norm is None else self.value_norm(v))
        k = self.position.rotate(k, context.positions)
        return {"key": checkpoint_name(k, "key"), "value": checkpoint_name(v, "value")}

    def _clipped(self, part: jax.Array) -> jax.Array:
        return part if self.spec.clip is None else jnp.clip(part, -self.spec.clip, self.spec.clip)

    def _seen(self, x: jax.Array, context: Context, cache: Cache | None) -> tuple[Cache | None, dict[str, Any]]:
        """The cache with these tokens, and keys and values of what they look at: with their places when decoding."""
        if self.spec.shares_keys:
            return cache, context.shared
        own = self._key_value(x, context)
        if context.mode != "decode":
            return None if cache is None else self.memory.remember(cache, context, **own), own
        new = self.memory.remember(cache, context, **own)
        seen = self.memory.visible(cache, new, context, **own)
        return new, {name: seen[name] for name in (*own, "positions", "segment_ids")}

    def _look(self, q: jax.Array, seen: dict[str, Any], context: Context) -> jax.Array:
        if context.mode != "decode":
            where, masks = rows(context, self.spec.window)
            return self._attend(q, seen["key"], seen["value"], self.position.bias(where, where), **masks)
        bias = self.position.bias(context.positions, seen["positions"])
        keys, values = seen["key"].astype(q.dtype), seen["value"].astype(q.dtype)
        if q.shape[1] == 1 and bias is None and self.spec.implementation == "pallas":
            return self._decode(q, keys, values, **shown(context, seen, self.spec.window, self.spec.kept_tokens))
        return self._attend(q, keys, values, bias, **places(context, seen))

    def _decode(self, q: jax.Array, k: jax.Array, v: jax.Array, **masks: jax.Array) -> jax.Array:
        """`_attend` for a single token of each row, by the kernel that splits the cache."""
        spec = self.spec
        sinks = None if self.sinks is None else self.sinks[...]
        return decode_attention(
            q, k, v, sinks=sinks, softcap=spec.softcap, scale=spec.scale, implementation=spec.implementation, **masks
        )

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, **masks: jax.Array | None
    ) -> jax.Array:
        spec = self.spec
        sinks = None if self.sinks is None else self.sinks[...]
        return attention(
            q, k, v, window=spec.window, kept=spec.kept_tokens, sinks=sinks, softcap=spec.softcap, scale=spec.scale,
            bias=bias, implementation=spec.implementation, **masks,
        )  # fmt: skip

    def _combine(self, y: jax.Array, context: Context) -> jax.Array:
        """What the output map reads, `[batch, time, heads, head_size]`, of what the heads attended to."""
        return y

    def entropy(self, x: jax.Array, context: Context) -> jax.Array:
        """Mean entropy in nats of the weights of every real token, float32 ``[batch, heads]``; builds all weights."""
        return mean_entropy(self.weights(x, context), context)

    def weights(self, x: jax.Array, context: Context) -> jax.Array:
        """What each token attends to, float32 ``[batch, heads, time, time]``."""
        q, (_, seen) = self._query(x, context), self._seen(x, context, None)
        index = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
        return attention_weights(
            q, seen["key"], window=self.spec.window, kept=self.spec.kept_tokens, softcap=self.spec.softcap,
            sinks=None if self.sinks is None else self.sinks[...], scale=self.spec.scale,
            bias=self.position.bias(index, index), segment_ids=context.segment_ids,
        )  # fmt: skip

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        """An empty cache for `length` tokens; keys and values are `[batch, slots, kv_heads, head_size]`.

        Nothing where they are an earlier layer's.
        """
        if self.spec.shares_keys:
            return {}
        shape = (self.kv_heads, self.size)
        return self.memory.empty(batch, length, dtype, key=shape, value=shape)


def mean_entropy(weights: jax.Array, context: Context) -> jax.Array:
    """Of `weights [batch, heads, time, keys]`, over the real tokens: nats, float32 ``[batch, heads]``."""
    live = (context.segment_ids != 0)[:, None]
    rows = jnp.sum(jax.scipy.special.entr(weights), axis=-1)
    return jnp.sum(rows * live, axis=-1) / jnp.maximum(jnp.sum(live, axis=-1), 1)
