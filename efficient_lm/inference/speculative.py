"""Speculative decoding: a small model drafts some tokens, and the whole model verifies them in one pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import LanguageModel
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
    def report(self) -> "Speculated":
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
        rows, yielded, flight = [_Row(max_new_tokens, end) for _ in prompts], 0, None
        made, counts = np.asarray(begun.token)[:, None], np.ones(len(prompts), int)
        last = -1 if end is None else end
        limits = jnp.asarray(np.where(made[:, 0] == last, 0, begun.lengths + max_new_tokens - 1), jnp.int32)
        state = _State(begun.token, begun.position, limits, begun.caches, own)
        fly = partial(self._verify, self.params, self.small_params, begun.keys, last, sampling=sampling)
        while True:
            for row, more, count in zip(rows, made, counts, strict=True):
                row.add(more[:count])
            self._counted = self._counted.timed(sum(len(row.tokens) for row in rows), perf_counter() - started)
            running = [len(row.tokens) for row in rows if row.left]
            if running and flight is None:
                flight = fly(state=state)
            ready = min(running, default=max(len(row.tokens) for row in rows))
            for index in range(yielded, ready):
                yield np.array([row.at(index) for row in rows], np.int32)
            yielded = ready
            if not running:
                return
            found, state = flight
            # As long as some row is sure to go on, the next pass is dispatched before this one's tokens are read.
            flight = fly(state=state) if max(row.left for row in rows) > self.tokens + 1 else None
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
        before = _taken_back(provisional, caches, 0) if self.shared and self._takes_back else caches
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

        (logits, after), size = run(0), jnp.zeros(token.shape, jnp.int32)
        for place in range(1, len(drafts)):
            unsure = live & (jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1) < self.confidence)

            def larger(
                place: int = place, unsure: jax.Array = unsure, logits: jax.Array = logits, size: jax.Array = size
            ) -> tuple[jax.Array, Caches, jax.Array]:
                more, later = run(place)
                return jnp.where(unsure[:, None], more, logits), later, jnp.where(unsure, place, size)

            def enough(
                logits: jax.Array = logits, after: Caches = after, size: jax.Array = size
            ) -> tuple[jax.Array, Caches, jax.Array]:
                return logits, after, size

            logits, after, size = jax.lax.cond(jnp.any(unsure), larger, enough)
        return logits, after, size

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
            return _taken_back(read, before, jnp.sum(kept, axis=1))

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


@dataclass(frozen=True)
class Speculated:
    """What became of drafts.

    Attributes:
        tokens: made, those of the prompts' passes included.
        verifications: of rows, each by one pass of the whole model.
        drafted: proposals that were verified.
        accepted: of these, those that stood.
        sizes: how many of them each draft made.
        seconds: of wall time, compilation and what was done with tokens as they came included.
    """

    tokens: int = 0
    verifications: int = 0
    drafted: int = 0
    accepted: int = 0
    sizes: tuple[int, ...] = ()
    seconds: float = 0.0

    def added(self, verifications: int, drafted: int, accepted: int, *sizes: int) -> "Speculated":
        """With one more pass."""
        by_size = tuple(map(int.__add__, self.sizes, sizes))
        return Speculated(
            self.tokens, self.verifications + verifications, self.drafted + drafted, self.accepted + accepted,
            by_size, self.seconds,
        )  # fmt: skip

    def timed(self, tokens: int, seconds: float) -> "Speculated":
        """With so many tokens, in such a time."""
        return Speculated(tokens, self.verifications, self.drafted, self.accepted, self.sizes, seconds)

    def figures(self) -> dict[str, Any]:
        """Plain numbers: `tokens`, `seconds`, `acceptance_rate` of proposals, `tokens_per_verification`, by size the
        share of proposals, `size_shares`."""
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "acceptance_rate": self.accepted / max(self.drafted, 1),
            "tokens_per_verification": 1 + self.accepted / max(self.verifications, 1),
            "size_shares": [count / max(self.drafted, 1) for count in self.sizes],
        }

    def __str__(self) -> str:
        found = self.figures()
        by_size = ", ".join(f"{100 * share:.0f} %" for share in found["size_shares"])
        sizes = f", drafted by size {by_size}" if len(self.sizes) > 1 else ""
        return (
            f"{self.tokens:,} tokens in {self.seconds:.2f} s: {100 * found['acceptance_rate']:.1f} % of drafted tokens "
            f"accepted, {found['tokens_per_verification']:.2f} tokens per verification{sizes}"
        )


class _Row:
    """The tokens of one row as they come."""

    def __init__(self, most: int, end: int | None):
        self.most, self.end, self.tokens = most, end, []

    @property
    def left(self) -> int:
        """How many more it may have."""
        ended = self.end is not None and self.tokens[-1:] == [self.end]
        return 0 if ended else self.most - len(self.tokens)

    def add(self, tokens: np.ndarray) -> None:
        for token in tokens:
            if self.left:
                self.tokens.append(int(token))

    def at(self, index: int) -> int:
        """What the row yields there; behind its end that again."""
        return self.tokens[min(index, len(self.tokens) - 1)]


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


def _taken_back(after: Any, before: Any, more: jax.Array | int) -> Any:
    """The token caches `after`, with only so many `more [batch]` tokens than `before`."""
    if not isinstance(after, dict):
        return after
    if "seen" not in after:
        return {name: _taken_back(part, before[name], more) for name, part in after.items()}
    seen = before["seen"] + more
    there = jnp.arange(after["segment_ids"].shape[-1]) < seen[..., None]
    return {**after, "seen": seen, "segment_ids": jnp.where(there, after["segment_ids"], 0)}


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
