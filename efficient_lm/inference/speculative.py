"""Speculative decoding: a small model drafts some tokens, and the whole model verifies them in one pass."""

from collections.abc import Iterator, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.errors import ConfigError
from efficient_lm.inference.decoding import Decoder
from efficient_lm.inference.rejection import propose, verify
from efficient_lm.inference.sampling import SamplingSpec
from efficient_lm.inference.speculated import Speculated
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.mixers.token_cache import truncated
from efficient_lm.models.parameters import Parameters
from efficient_lm.models.stack import Caches

Draft = tuple[LanguageModel, Parameters]
"""A smaller model with the vocabulary of the whole, and its parameters."""


class SpeculativeDecoder(Decoder):
    """Generates what `Decoder` does, with fewer passes of the whole model.

    Greedy tokens are those of the whole model (where rounding does not decide: its pass over several tokens adds in
    another order than one over a single token); sampled ones have its distribution (see `rejection`).

    A draft whose mixers are those of the whole, so that only channel mixers are smaller, reads the whole's cache and
    keeps none (Devvrit et al. 2024, arXiv 2310.07707, section 3); another has its own. Rejected tokens are taken out of
    a cache that has a place for each token; where states or windows keep no such places, the tokens that stand are read
    once more from the cache before them, unless all stand.

    Args:
        drafts: one, or several that read the whole's cache, smallest first: each token is drafted by the first that is
            confident of it, or by the last (in the manner of sorted speculative decoding, Kavehzadeh et al. 2024,
            arXiv 2407.01955).
        tokens: that are drafted at a time.
        confidence: least probability of the likeliest token at which a draft is confident.

    Raises:
        ConfigError: a model whose tokens compete for experts, so that a pass of several computes something else; or
            several drafts, and one that does not share the cache.
    """

    def __init__(
        self,
        model: LanguageModel,
        params: Parameters,
        drafts: Sequence[Draft],
        dtype: jax.typing.DTypeLike = jnp.float32,
        tokens: int = 4,
        confidence: float = 0.5,
    ):
        super().__init__(model, params, dtype)
        _check_no_capacity(model)
        shares = [shares_cache(model, small) for small, _ in drafts]
        if len(drafts) > 1 and not all(shares):
            raise ConfigError(
                "draft: several sizes read one cache, that of the whole model, and so differ in ffn or experts only; "
                "name these axes, or one size"
            )
        self.small, self.small_params = [small for small, _ in drafts], [params for _, params in drafts]
        self.tokens, self.confidence, self.shared = tokens, confidence, shares[0]
        self._takes_back = takes_back(model)
        self._counted = Speculated(sizes=(0,) * len(drafts))
        self._read = jax.jit(self._first_of_draft, static_argnames="length")
        self._verify = jax.jit(self._block, static_argnames="sampling", donate_argnames="state")

    @property
    def report(self) -> Speculated:
        """What became of the drafts of the newest stream so far."""
        return self._counted

    def stream(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        sampling: SamplingSpec,
        seed: int = 0,
        end: int | None = None,
    ) -> Iterator[np.ndarray]:
        """As `Decoder.stream`; rows go on as far as their own drafts stand, and wait for each other to be yielded."""
        self._counted, started = Speculated(sizes=(0,) * len(self.small)), perf_counter()
        begun = self._begin(prompts, max_new_tokens, sampling, seed)
        own = None
        if not self.shared:
            own = self._read(self.small_params[0], begun.tokens, begun.context, length=begun.length)
        rows, flight = _Rows(len(prompts), max_new_tokens, end), None
        made, counts = np.asarray(begun.token)[:, None], np.ones(len(prompts), int)
        last = -1 if end is None else end
        limits = jnp.asarray(np.where(made[:, 0] == last, 0, begun.lengths + max_new_tokens - 1), jnp.int32)
        state = _State(begun.token, begun.position, limits, begun.caches, own)
        fly = partial(self._verify, self.params, self.small_params, begun.keys, last, sampling=sampling)
        while True:
            rows.add(made, counts)
            self._counted = self._counted.timed(rows.tokens, perf_counter() - started)
            if rows.left and flight is None:
                flight = fly(state=state)
            yield from rows.ready()
            if not rows.left:
                return
            found, state = flight
            # As long as some row is sure to go on, the next pass is dispatched before this one's tokens are read.
            flight = fly(state=state) if rows.left > self.tokens + 1 else None
            made, counts = np.asarray(found.tokens), np.asarray(found.counts)
            self._counted = self._counted.added(*np.asarray(found.figures).tolist())

    def _first_of_draft(self, params: Parameters, tokens: jax.Array, context: Context, length: int) -> Caches:
        caches = self.small[0].init_caches(tokens.shape[0], length, self.dtype)
        return self.small[0].hidden(params, tokens, context, caches, dtype=self.dtype)[1]

    def _block(
        self,
        params: Parameters,
        drafts: list[Parameters],
        keys: jax.Array,
        end: jax.Array,
        state: "_State",
        sampling: SamplingSpec,
    ) -> tuple["_Found", "_State"]:
        """Draft and verify once.

        Args:
            end: id behind which a row does nothing more; -1 for none.
        """
        token, position, limits, caches, own = state
        positions = position[:, None] + jnp.arange(self.tokens + 1)
        real = positions < limits[:, None]
        drafted, probabilities, sizes, provisional = self._drafted(
            drafts, token, positions, real, keys, caches if self.shared else own, sampling
        )
        before = truncated(provisional, caches, 0) if self.shared and self._takes_back else caches
        tokens = jnp.concatenate([token[:, None], drafted], axis=1)
        hidden, read, _ = self.model.hidden(params, tokens, _context(positions, real), before, dtype=self.dtype)
        logits = self.model.logits_from(params, hidden)
        accepted, following = verify(logits, drafted, probabilities, real[:, 1:], keys, positions + 1, sampling)
        place = jnp.arange(self.tokens + 1)[None]
        kept = real & (place <= accepted[:, None])
        caches = self._after(params, tokens, positions, real, kept, before, read)
        if own is not None:
            context = _context(positions, kept)
            own = self.small[0].hidden(drafts[0], tokens, context, own, dtype=self.dtype)[1]
        made = jnp.where(place < accepted[:, None], jnp.roll(tokens, -1, axis=1), following[:, None])
        limits = jnp.where(jnp.any((made == end) & kept, axis=1), 0, limits)
        figures = [jnp.sum(real[:, 0]), jnp.sum(real[:, 1:]), jnp.sum(accepted), *sizes]
        found = _Found(made, accepted + 1, jnp.stack(figures))
        return found, _State(following, position + accepted + 1, limits, caches, own)

    def _drafted(
        self,
        drafts: list[Parameters],
        token: jax.Array,
        positions: jax.Array,
        real: jax.Array,
        keys: jax.Array,
        caches: Caches,
        sampling: SamplingSpec,
    ) -> tuple[jax.Array, jax.Array, jax.Array, Caches]:
        """Tokens ``[batch, k]``, their probabilities, how many each size drafted, the cache with all but the last."""

        def step(carry: tuple[jax.Array, Caches], now: tuple[jax.Array, ...]) -> tuple[Any, Any]:
            token, caches = carry
            position, live, counts = now
            logits, caches, size = self._confident(drafts, token, position, live, caches)
            token, chances = propose(logits, keys, position + 1, sampling)
            sizes = jnp.sum((size[:, None] == jnp.arange(len(drafts))) & counts[:, None], axis=0)
            return (token, caches), (token, chances, sizes)

        steps = (positions[:, :-1].T, real[:, :-1].T, real[:, 1:].T)
        (_, caches), (tokens, chances, sizes) = jax.lax.scan(step, (token, caches), steps)
        return tokens.T, chances.swapaxes(0, 1), sizes.sum(0), caches

    def _confident(
        self, drafts: list[Parameters], token: jax.Array, position: jax.Array, live: jax.Array, caches: Caches
    ) -> tuple[jax.Array, Caches, jax.Array]:
        """Logits ``[batch, vocab]`` of the first draft that is confident, the cache, and which it was ``[batch]``."""
        context = _context(position[:, None], live[:, None])

        def run(place: int) -> tuple[jax.Array, Caches]:
            small, values = self.small[place], drafts[place]
            hidden, after, _ = small.hidden(values, token[:, None], context, caches, dtype=self.dtype)
            return small.logits_from(values, hidden[:, -1]), after

        def larger(
            place: int, unsure: jax.Array, logits: jax.Array, after: Caches, size: jax.Array
        ) -> tuple[jax.Array, Caches, jax.Array]:
            more, after = run(place)
            return jnp.where(unsure[:, None], more, logits), after, jnp.where(unsure, place, size)

        found = (*run(0), jnp.zeros(token.shape, jnp.int32))
        for place in range(1, len(drafts)):
            unsure = live & (jnp.max(jax.nn.softmax(found[0], axis=-1), axis=-1) < self.confidence)
            found = jax.lax.cond(jnp.any(unsure), partial(larger, place, unsure), lambda *same: same, *found)
        return found

    def _after(
        self,
        params: Parameters,
        tokens: jax.Array,
        positions: jax.Array,
        real: jax.Array,
        kept: jax.Array,
        before: Caches,
        read: Caches,
    ) -> Caches:
        """The cache with the tokens `kept [batch, k + 1]`, of that `before` them and that with all that were `read`."""
        if self._takes_back:
            return truncated(read, before, jnp.sum(kept, axis=1))

        def again() -> Caches:
            return self.model.hidden(params, tokens, _context(positions, kept), before, dtype=self.dtype)[1]

        return jax.lax.cond(jnp.all(kept == real), lambda: read, again)


class _State(NamedTuple):
    """What a pass goes on from.

    Attributes:
        token, position: int32 ``[batch]``, the newest token of each row, which no cache has yet, and its place.
        limits: int32 ``[batch]``, the position that a row must not reach; 0 has it do nothing.
        caches, own: of the whole, and of a draft that does not share it.
    """

    token: jax.Array
    position: jax.Array
    limits: jax.Array
    caches: Caches
    own: Caches | None


class _Found(NamedTuple):
    """What a pass made: ``tokens [batch, k + 1]``, how many of them count, ``counts [batch]``, and `figures`: rows that
    were verified, proposals, those that stood, and of the proposals those of each size."""

    tokens: jax.Array
    counts: jax.Array
    figures: jax.Array


class _Rows:
    """The tokens of each row as they come; rows wait for each other to be handed out."""

    def __init__(self, count: int, most: int, end: int | None):
        self.most, self.end, self.rows, self._given = most, end, [[] for _ in range(count)], 0

    def add(self, made: np.ndarray, counts: np.ndarray) -> None:
        """`made [rows, any]`, of which so many count; what is behind a row's end does not."""
        for row, more, count in zip(self.rows, made.tolist(), counts, strict=True):
            for token in more[:count]:
                if self._left(row):
                    row.append(token)

    def _left(self, row: list[int]) -> int:
        ended = self.end is not None and row[-1:] == [self.end]
        return 0 if ended else self.most - len(row)

    @property
    def left(self) -> int:
        """How many tokens are still to come, at most, of the row that has most to come."""
        return max(map(self._left, self.rows))

    @property
    def tokens(self) -> int:
        """How many there are."""
        return sum(map(len, self.rows))

    def ready(self) -> Iterator[np.ndarray]:
        """int32 ``[rows]`` for each place that all rows have reached since; behind its end a row yields that again."""
        going = [len(row) for row in self.rows if self._left(row)]
        reached = min(going, default=max(map(len, self.rows)))
        begin, self._given = self._given, reached
        for index in range(begin, reached):
            yield np.array([row[min(index, len(row) - 1)] for row in self.rows], np.int32)


def shares_cache(model: LanguageModel, small: LanguageModel) -> bool:
    """Whether what a smaller model keeps of a token is what the whole keeps: same mixers, on the same stream."""

    def mixers(of: LanguageModel) -> list[Any]:
        # A part of all units says of itself what a smaller one must, such as how many there were.
        width = of.spec.width
        return [(cut.mixer, cut.depth) for cut in (layer.resolved(width).cut(width, {}) for layer in of.layers)]

    if model.spec.width != small.spec.width or mixers(model) != mixers(small):
        return False
    # Layers that differ in what is cut fall into segments of their own.
    caches = [jax.eval_shape(lambda of=of: of.init_caches(1, 1)) for of in (model, small)]
    return jax.tree.structure(caches[0]) == jax.tree.structure(caches[1]) and all(
        jax.tree.leaves(jax.tree.map(lambda a, b: a.shape == b.shape, *caches))
    )


def takes_back(model: LanguageModel) -> bool:
    """Whether the newest tokens can be taken out of the model's cache by their number alone."""
    router = model.spec.pregate is None or model.spec.pregate.block is None
    return router and all(
        layer.depth is None and (layer.mixer is None or layer.mixer.takes_back) for layer in model.layers
    )


def _context(positions: jax.Array, real: jax.Array) -> Context:
    return Context(positions, real.astype(jnp.int32), "decode")


def _check_no_capacity(model: LanguageModel) -> None:
    for name, layer in zip(model.spec.layer_names(), model.layers, strict=True):
        dispatch = getattr(layer.ffn, "dispatch", None)
        if dispatch is not None and dispatch.capacity_factor is not None:
            raise ConfigError(
                f"draft: tokens compete for the experts of model.blocks.{name}.ffn, so verifying several at a time "
                "is not decoding one by one; set its dispatch.capacity_factor to null"
            )
