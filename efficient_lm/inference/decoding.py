"""Cached decoding of a batch of prompts of unequal length."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.inference.sampling import SamplingSpec, sample
from efficient_lm.models.computed import Computed, computed
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters
from efficient_lm.models.skipping.base import SkippingSpec
from efficient_lm.models.stack import Caches

BUCKET = 64
"""Prompt and cache lengths are rounded up to multiples of this, so that few shapes are compiled."""


class Decoder:
    """Generates with one model; compiled programs are kept between calls.

    Args:
        dtype: of the computation and of the cache.
        skipping: which layers each token runs; None runs all.

    Raises:
        ConfigError: a mixer of the model is bidirectional, or the policy cannot work with the model.
    """

    def __init__(
        self,
        model: LanguageModel,
        params: Parameters,
        dtype: jax.typing.DTypeLike = jnp.float32,
        skipping: SkippingSpec | None = None,
    ):
        model.spec.check_decodes()
        if skipping is not None:
            skipping.check(model)
        self.model, self.params, self.dtype, self.skipping = model, params, dtype, skipping
        self._counts = skipping is not None or model.stack.passes_by
        self._ran = _Ran(len(model.layers))
        self._prefill = jax.jit(self._first, static_argnames=("length", "sampling"))
        self._step = jax.jit(self._next, static_argnames="sampling", donate_argnames="caches")

    @property
    def report(self) -> Computed | None:
        """What the newest stream has computed so far for the tokens it made and read again; None where it is all.

        The prompt, and what ended rows go on computing, are not among it.
        """
        return self._ran.report(self.model, self.skipping) if self._counts else None

    def stream(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        sampling: SamplingSpec,
        seed: int = 0,
        end: int | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield int32 ``[batch]``, one token for each prompt, until all have ended or `max_new_tokens` are made.

        Args:
            prompts: int32 ids, at least one token each.
            seed: of the sampling; a row's tokens depend on it and on the row's place in the batch.
            end: id that ends a row; from there on the row yields it again.

        Raises:
            ConfigError: prompt and new tokens together are longer than the model's table of positions.
        """
        begun = self._begin(prompts, max_new_tokens, sampling, seed)
        token, position, keys, caches = begun.token, begun.position, begun.keys, begun.caches
        ended = np.zeros(len(prompts), bool)
        self._ran = ran = _Ran(len(self.model.layers))
        for index in range(1, max_new_tokens + 1):
            # The next step is dispatched before this one's token is read, so that the device does not wait for us.
            ahead = index < max_new_tokens
            following = (
                self._step(self.params, token, position, keys, caches=caches, sampling=sampling) if ahead else None
            )
            chosen = np.asarray(token)
            if end is not None:
                chosen = np.where(ended, end, chosen)
                ended |= chosen == end
            yield chosen
            if following is None or (end is not None and ended.all()):
                return
            token, position, caches, halves = following
            if halves is not None:
                ran.add(np.asarray(halves), ~ended, begun.lengths + index)

    def abstract_step(
        self, rows: int, length: int, sampling: SamplingSpec
    ) -> tuple[Callable, tuple[Any, ...], dict[str, Any]]:
        """What decodes the next token of each row: the function, shapes of its arguments, and options of `jax.jit`.

        Args:
            length: of prompt and new tokens together.
        """
        caches = jax.eval_shape(lambda: self.model.init_caches(rows, rounded(length), self.dtype))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
        token = jax.ShapeDtypeStruct((rows,), jnp.int32)

        def step(*arguments: Any) -> Any:
            return self._next(*arguments, sampling=sampling)

        return step, (self.params, token, token, keys, caches), {"donate_argnums": 4}

    def _begin(self, prompts: Sequence[np.ndarray], max_new_tokens: int, sampling: SamplingSpec, seed: int) -> "_Begun":
        """Read the prompts, whose errors are those of `stream`."""
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        longest = int(lengths.max())
        self.model.check_length(longest + max_new_tokens, "prompt + max_new_tokens")
        tokens, context = left_padded(prompts, rounded(longest))
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(len(prompts)))
        length = rounded(longest + max_new_tokens)
        token, position, caches, _ = self._prefill(self.params, tokens, context, keys, length=length, sampling=sampling)
        return _Begun(tokens, context, lengths, keys, length, token, position, caches)

    def _first(
        self,
        params: Parameters,
        tokens: jax.Array,
        context: Context,
        keys: jax.Array,
        length: int,
        sampling: SamplingSpec,
    ) -> tuple[jax.Array, jax.Array, Caches, jax.Array | None]:
        caches = self.model.init_caches(tokens.shape[0], length, self.dtype)
        return self._choose(params, tokens, context, keys, caches, sampling)

    def _next(
        self,
        params: Parameters,
        token: jax.Array,
        position: jax.Array,
        keys: jax.Array,
        caches: Caches,
        sampling: SamplingSpec,
    ) -> tuple[jax.Array, jax.Array, Caches, jax.Array | None]:
        context = Context(position[:, None], jnp.ones_like(position)[:, None], "decode")
        return self._choose(params, token[:, None], context, keys, caches, sampling)

    def _choose(
        self,
        params: Parameters,
        tokens: jax.Array,
        context: Context,
        keys: jax.Array,
        caches: Caches,
        sampling: SamplingSpec,
    ) -> tuple[jax.Array, jax.Array, Caches, jax.Array | None]:
        context = replace(context, record=self.model.stack.passes_by)
        hidden, caches, auxiliary = self.model.hidden(
            params, tokens, context, caches, dtype=self.dtype, skipping=self.skipping
        )
        logits = self.model.logits_from(params, hidden[:, -1])
        position, ran = context.positions[:, -1] + 1, None
        if self._counts:
            ran = self.model.stack.ran(auxiliary.observed, context.segment_ids != 0)[..., -1]
        return sample(logits, jax.vmap(jax.random.fold_in)(keys, position), sampling), position, caches, ran


class _Begun(NamedTuple):
    """Prompts that were read.

    Attributes:
        tokens, context: of the prompts, left-padded.
        lengths: int32 ``[batch]``, of the prompts.
        keys: ``[batch]``, of each row's random numbers.
        length: that the caches have room for.
        token, position: int32 ``[batch]``, the first token of each row, which no cache has yet, and its place.
    """

    tokens: jax.Array
    context: Context
    lengths: np.ndarray
    keys: jax.Array
    length: int
    token: jax.Array
    position: jax.Array
    caches: Caches


class _Ran:
    """Which halves of which layers single tokens ran, counted as they come."""

    def __init__(self, layers: int):
        self.halves, self.tokens, self.seen = np.zeros((2, layers)), 0, 0

    def add(self, halves: np.ndarray, rows: np.ndarray, seen: np.ndarray) -> None:
        """A token of each of the `rows [batch]` that count: `halves [2, layers, batch]` ran, so many tokens `seen`."""
        self.halves += halves[..., rows].sum(-1)
        self.tokens += int(rows.sum())
        self.seen += int(seen[rows].sum())

    def report(self, model: LanguageModel, skipping: SkippingSpec | None) -> Computed:
        # A sequence of this length has tokens that see as many on average.
        length = max(2 * self.seen / max(self.tokens, 1) - 1, 1.0)
        return computed(model, skipping, self.halves, self.tokens, length)


def rounded(length: int) -> int:
    """A length of prompts or caches up to which there is one compiled program."""
    return -(-length // BUCKET) * BUCKET


def left_padded(prompts: Sequence[np.ndarray], length: int) -> tuple[jax.Array, Context]:
    """Prompts that all end in the last column, so that one column holds every row's next-token logits."""
    shape = (len(prompts), length)
    arrays: dict[str, Any] = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segments")}
    for row, prompt in enumerate(prompts):
        first = length - len(prompt)
        arrays["tokens"][row, first:] = prompt
        arrays["positions"][row, first:] = np.arange(len(prompt))
        arrays["segments"][row, first:] = 1
    return jnp.asarray(arrays["tokens"]), Context(
        jnp.asarray(arrays["positions"]), jnp.asarray(arrays["segments"]), "prefill"
    )
