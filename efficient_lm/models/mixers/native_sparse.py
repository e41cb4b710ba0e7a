"""Native sparse attention: each token sees summaries of all blocks, a few blocks whole, and a window."""

from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from efficient_lm.errors import ConfigError
from efficient_lm.models.context import Context
from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.layers.positions import NoPositionSpec, PositionSpec, RotarySpec
from efficient_lm.models.mixers.attention import HEAD_SIZE
from efficient_lm.models.mixers.base import Cache, MixerSpec, dividing
from efficient_lm.models.mixers.token_cache import TokenCache, mean_seen
from efficient_lm.models.parameters import Constant, Initialization, parameter
from efficient_lm.spec import Count, OneOf, PerLayer
from kernels_pallas.attention import attention

BRANCHES = 3
QUERIES = 64
"""Tokens whose selected keys are gathered at one time."""
HIDDEN = -1e30


class NativeSparseSpec(MixerSpec):
    """``Σ_c sigmoid(W_c x) * attention(q, K_c, V_c)`` (Yuan et al. 2025, arXiv 2502.11089, eq. 5). The sets of keys are

    - compressed: one key and value for each complete block of a document, a weighted sum over the block's tokens with
      learned weights by place and channel, which start as the mean (the paper has a small network there);
    - selected: all tokens of the token's own block, of the one before, of the document's first, and of the blocks whose
      compressed keys the heads of a group attend to most (eq. 8 to 10, for blocks of one size);
    - window: the tokens just before.

    One set of keys and values serves all three (the paper's branches each have their own). The cost of a token grows
    with the length by its compressed keys only: selected blocks are gathered, and others are not touched. The cache
    holds all keys and values, and the compressed ones besides.

    Attributes:
        heads, kv_heads, head_size: as in attention; the heads that share keys and values also share selected blocks.
        block_size: tokens in a block.
        selected_blocks: blocks that each token sees whole, its own included.
        window: tokens that the window branch sees.
        position: rotary or none.
    """

    needs_every_token: ClassVar[bool] = True
    kind: Literal["native_sparse"] = "native_sparse"
    heads: PerLayer[Count | None] = None
    kv_heads: PerLayer[Count | None] = None
    head_size: Count | None = None
    block_size: Count = 64
    selected_blocks: Count = 16
    window: PerLayer[Count] = 512
    position: OneOf[PositionSpec] = RotarySpec()

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        sizes = self.resolved(width)
        heads, groups = sizes.heads, sizes.kv_heads
        if self.head_size is None and width % heads:
            yield "heads", f"{heads} heads do not divide width {width}; {dividing(width, heads)}, or set head_size"
        if heads % groups:
            yield "kv_heads", f"{groups} do not divide {heads} heads; {dividing(heads, groups)}"
        if not isinstance(self.position, RotarySpec | NoPositionSpec):
            yield (
                "position",
                f"'{self.position.kind}' adds to the logits of every pair of tokens; rotary and none do not",
            )
        if isinstance(self.position, RotarySpec) and sizes.head_size % 2:
            yield "head_size", f"rotary positions turn pairs of values, and {sizes.head_size} is odd"

    def resolved(self, width: int) -> "NativeSparseSpec":
        heads = self.heads or max(1, width // (self.head_size or HEAD_SIZE))
        sizes = {"heads": heads, "kv_heads": self.kv_heads or heads, "head_size": self.head_size or width // heads}
        return self.model_copy(update=sizes)

    def counted(self) -> dict[str, tuple[str, ...]]:
        return {"heads": ("kv_heads", "heads")}

    def held_to(self, base: "NativeSparseSpec", width: int, base_width: int) -> "NativeSparseSpec":
        size, its = self.resolved(width).head_size, base.resolved(base_width).head_size
        if size != its:
            raise ConfigError(f"head_size: {size} values at width {width} and {its} at {base_width}; give it one size")
        return self

    def build(self, width: int, init: Initialization) -> nnx.Module:
        return NativeSparse(self, width, init)

    def flops_per_token(self, width: int, context_length: int) -> float:
        """Maps, and logits and sums over the keys of each branch."""
        sizes = self.resolved(width)
        blocks, rest = divmod(context_length, self.block_size)
        compressed = (self.block_size * blocks * (blocks - 1) / 2 + blocks * (rest + 1)) / context_length
        selected = mean_seen(context_length, self.block_size * self.selected_blocks, 0)
        keys = compressed + selected + mean_seen(context_length, sizes.window, 0)
        maps = sizes.head_size * 2 * (sizes.heads + sizes.kv_heads) + BRANCHES * sizes.heads
        return 2.0 * width * maps + 4.0 * sizes.heads * sizes.head_size * keys


class Tokens(NamedTuple):
    """Keys and values ``[batch, slots, kv_heads, head_size]``; the tokens of a document lie in order, without gaps."""

    key: jax.Array
    value: jax.Array


class Blocks(NamedTuple):
    """Compressed keys and values ``[batch, blocks, kv_heads, head_size]`` of complete blocks.

    `number` is the block's place in its document, `segment` the document, 0 for an entry that is none.
    """

    key: jax.Array
    value: jax.Array
    number: jax.Array
    segment: jax.Array


class Queries(NamedTuple):
    """Queries ``[batch, time, kv_heads, heads per group, head_size]``, and where they are: position, document, slot."""

    values: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    slots: jax.Array


class NativeSparse(nnx.Module):
    def __init__(self, spec: NativeSparseSpec, width: int, init: Initialization):
        self.spec = spec = spec.resolved(width)
        embed, heads = {"embed": width}, {"heads": spec.heads, "head_dim": spec.head_size}
        pair = {"key_value": 2, "kv_heads": spec.kv_heads, "head_dim": spec.head_size}
        self.query = Linear(embed, heads, init=init)
        self.key_value = Linear(embed, pair, init=init, batch=1)
        self.gate = Linear(embed, {"branch": BRANCHES, "heads": spec.heads}, init=init, batch=1)
        self.output = Linear(heads, embed, init=init, residual=True)
        places = {"key_value": 2, "place": spec.block_size, "head_dim": spec.head_size}
        self.compression = parameter(places, Constant(1 / spec.block_size))
        self.position = spec.position.build(spec.heads, spec.head_size)
        self.memory = TokenCache()

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """`x [batch, time, width]` → the same shape and dtype, and the cache with these tokens added."""
        q, tokens = self._project(x, context)
        if context.mode != "decode":
            slots = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
            blocks = self._complete(tokens, slots, context)
            window = self._window_of_rows(q, tokens, context)
            cache = None if cache is None else self._remember(cache, tokens, blocks, context)
        else:
            live = context.segment_ids != 0
            slots = cache["seen"][:, None] + jnp.cumsum(live, axis=1) - 1
            held = self.memory.remember(cache, context, key=tokens.key, value=tokens.value)
            tokens = Tokens(held["key"].astype(x.dtype), held["value"].astype(x.dtype))
            cache = self._remember(cache, None, self._complete(tokens, slots, context), context) | held
            blocks = Blocks(*(cache[f"block_{name}"] for name in Blocks._fields))
            window = None
        grouped = q.reshape(*q.shape[:2], self.spec.kv_heads, -1, self.spec.head_size)
        queries = Queries(grouped, context.positions, context.segment_ids, slots)
        attended = self._attend(queries, tokens, blocks, window is None)
        attended = attended if window is None else jnp.concatenate([attended, window[:, :, None]], axis=2)
        gates = jax.nn.sigmoid(self.gate(x).astype(jnp.float32))
        y = jnp.einsum("btch,btchd->bthd", gates, attended.astype(jnp.float32)).astype(x.dtype)
        return self.output(checkpoint_name(y, "attended")), cache

    def _project(self, x: jax.Array, context: Context) -> tuple[jax.Array, Tokens]:
        pair = self.key_value(x)
        q = self.position.rotate(self.query(x), context.positions)
        k = self.position.rotate(pair[:, :, 0], context.positions)
        return checkpoint_name(q, "query"), Tokens(checkpoint_name(k, "key"), checkpoint_name(pair[:, :, 1], "value"))

    def _complete(self, tokens: Tokens, slots: jax.Array, context: Context) -> Blocks:
        """The blocks that some token of a piece completes, its tokens being in `slots [batch, time]`."""
        size, (batch, time) = self.spec.block_size, slots.shape
        ends = (context.segment_ids != 0) & (context.positions % size == size - 1)
        found = jnp.argsort(~ends, axis=1, stable=True)[:, : time // size + 1]
        last, row = jnp.take_along_axis(slots, found, axis=1), jnp.arange(batch)[:, None, None]
        rows = jnp.maximum(last[:, :, None] - size + 1 + jnp.arange(size), 0)
        weights = self.compression[...].astype(tokens.key.dtype)
        key, value = (
            jnp.einsum("bnpgd,pd->bngd", part[row, rows], weight, preferred_element_type=jnp.float32).astype(part.dtype)
            for part, weight in zip(tokens, weights, strict=True)
        )
        there = jnp.take_along_axis(ends, found, axis=1)
        segment = jnp.where(there, jnp.take_along_axis(context.segment_ids, found, axis=1), 0)
        return Blocks(key, value, jnp.take_along_axis(context.positions, found, axis=1) // size, segment)

    def _window_of_rows(self, q: jax.Array, tokens: Tokens, context: Context) -> jax.Array:
        ids = context.segment_ids if context.packed else None
        return attention(q, tokens.key, tokens.value, window=self.spec.window, segment_ids=ids)

    def _attend(self, queries: Queries, tokens: Tokens, blocks: Blocks, window: bool) -> jax.Array:
        """``[batch, time, branches, heads, head_size]``: compressed, selected and, if `window`, the window's."""
        time = queries.slots.shape[1]
        steps = -(-time // QUERIES)
        if steps == 1:
            return self._attend_some(queries, tokens, blocks, window)

        def cut(values: jax.Array) -> jax.Array:
            padded = jnp.pad(values, [(0, 0), (0, steps * QUERIES - time)] + [(0, 0)] * (values.ndim - 2))
            return padded.reshape(values.shape[0], steps, QUERIES, *values.shape[2:]).swapaxes(0, 1)

        # What is gathered for some queries is gathered again in the backward pass, and never kept.
        some = jax.checkpoint(lambda part: self._attend_some(part, tokens, blocks, window), prevent_cse=False)
        y = jax.lax.map(some, Queries(*map(cut, queries))).swapaxes(0, 1)
        return y.reshape(y.shape[0], steps * QUERIES, *y.shape[3:])[:, :time]

    def _attend_some(self, queries: Queries, tokens: Tokens, blocks: Blocks, window: bool) -> jax.Array:
        compressed, weights = self._attend_blocks(queries, blocks)
        parts = [compressed, self._attend_rows(queries, tokens, *self._select(queries, blocks, weights))]
        if window:
            parts.append(self._attend_rows(queries, tokens, *self._latest(queries)))
        joined = jnp.stack(parts, axis=2)
        return joined.reshape(*joined.shape[:3], self.spec.heads, self.spec.head_size)

    def _attend_blocks(self, queries: Queries, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
        """Over compressed keys: outputs, and weights float32 ``[batch, time, groups, members, blocks]``."""
        q, end = queries.values, (blocks.number + 1) * self.spec.block_size - 1
        seen = _same(queries, blocks) & (end[:, None] <= queries.positions[:, :, None])
        logits = jnp.einsum("btgmd,bngd->btgmn", q, blocks.key.astype(q.dtype), preferred_element_type=jnp.float32)
        weights = _weights(self.spec.head_size**-0.5 * logits, seen[:, :, None, None])
        return jnp.einsum("btgmn,bngd->btgmd", weights.astype(q.dtype), blocks.value.astype(q.dtype)), weights

    def _select(self, queries: Queries, blocks: Blocks, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Slots ``[batch, time, groups, keys]`` of the selected blocks' tokens, and which of them the token sees."""
        size, members = self.spec.block_size, queries.values.shape[3]
        own, number = (queries.positions // size)[:, :, None], blocks.number[:, None]
        earlier = _same(queries, blocks) & (number < own)
        always = earlier & ((number == 0) | (number == own - 1))
        # The weights of a group's heads sum to at most their number.
        score = jnp.sum(jax.lax.stop_gradient(weights), axis=3) + (members + 1.0) * always[:, :, None]
        score = jnp.where(earlier[:, :, None], score, -1.0)
        best, index = jax.lax.top_k(score, min(self.spec.selected_blocks - 1, score.shape[-1]))
        chosen = jnp.take_along_axis(jnp.broadcast_to(number[:, :, None], score.shape), index, axis=-1)
        mine = jnp.broadcast_to(own[:, :, None], (*score.shape[:3], 1))
        first = jnp.concatenate([chosen, mine], axis=-1)[..., None] * size + jnp.arange(size)
        valid = jnp.concatenate([best >= 0, jnp.ones(mine.shape, bool)], axis=-1)[..., None]
        seen = valid & (first <= queries.positions[:, :, None, None, None])
        begin = (queries.slots - queries.positions)[:, :, None, None]
        return begin + first.reshape(*first.shape[:3], -1), seen.reshape(*first.shape[:3], -1)

    def _latest(self, queries: Queries) -> tuple[jax.Array, jax.Array]:
        """The same of the window's tokens."""
        back = jnp.arange(self.spec.window)
        seen = back <= queries.positions[:, :, None]
        shape = (*seen.shape[:2], self.spec.kv_heads, self.spec.window)
        slots = queries.slots[:, :, None] - back
        return jnp.broadcast_to(slots[:, :, None], shape), jnp.broadcast_to(seen[:, :, None], shape)

    def _attend_rows(self, queries: Queries, tokens: Tokens, slots: jax.Array, seen: jax.Array) -> jax.Array:
        """Attention of each query over tokens of its own, in `slots [batch, time, groups, keys]`."""
        q, row, group = queries.values, jnp.arange(slots.shape[0])[:, None, None, None], jnp.arange(slots.shape[2])
        places = (row, jnp.clip(slots, 0, tokens.key.shape[1] - 1), group[:, None])
        key, value = tokens.key[places], tokens.value[places]
        logits = jnp.einsum("btgmd,btgsd->btgms", q, key, preferred_element_type=jnp.float32)
        live = (queries.segment_ids != 0)[:, :, None, None]
        weights = _weights(self.spec.head_size**-0.5 * logits, (seen & live)[:, :, :, None])
        return jnp.einsum("btgms,btgsd->btgmd", weights.astype(q.dtype), value)

    def init_cache(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
        """An empty cache for `length` tokens: all keys and values, and those of every complete block."""
        shape, count = (self.spec.kv_heads, self.spec.head_size), length // self.spec.block_size + 1
        integers = jnp.zeros((batch, count), jnp.int32)
        block = jnp.zeros((batch, count, *shape), dtype)
        blocks = Blocks(block, block, integers, integers)
        held = {f"block_{name}": value for name, value in blocks._asdict().items()}
        tokens = self.memory.empty(batch, length, dtype, key=shape, value=shape)
        return {**tokens, **held, "blocks": jnp.zeros((batch,), jnp.int32)}

    def _remember(self, cache: Cache, tokens: Tokens | None, blocks: Blocks, context: Context) -> Cache:
        """The cache with these blocks and, unless None, these tokens added."""
        new = {} if tokens is None else self.memory.remember(cache, context, key=tokens.key, value=tokens.value)
        there = blocks.segment != 0
        place = cache["blocks"][:, None] + jnp.cumsum(there, axis=1) - 1
        place = jnp.where(there, place, cache["block_segment"].shape[1])
        row = jnp.arange(place.shape[0])[:, None]
        for name, value in blocks._asdict().items():
            old = cache[f"block_{name}"]
            new[f"block_{name}"] = old.at[row, place].set(value.astype(old.dtype), mode="drop")
        return cache | new | {"blocks": cache["blocks"] + jnp.sum(there, axis=1)}


def _same(queries: Queries, blocks: Blocks) -> jax.Array:
    """Bool ``[batch, time, blocks]``: query and block are of one document."""
    return (queries.segment_ids[:, :, None] == blocks.segment[:, None]) & (blocks.segment[:, None] != 0)


def _weights(logits: jax.Array, seen: jax.Array) -> jax.Array:
    """Softmax over the last axis of what is seen; zeros where nothing is."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.where(seen, logits, HIDDEN), axis=-1, keepdims=True))
    powers = jnp.where(seen, jnp.exp(jnp.where(seen, logits - largest, 0.0)), 0.0)
    total = jnp.sum(powers, axis=-1, keepdims=True)
    return powers / jnp.where(total == 0, 1.0, total)
