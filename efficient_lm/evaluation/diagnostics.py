"""What goes on inside a model's mixers: the size of recurrent states, decay, the entropy of attention.

A recurrent state that grows with position, in a few channels above all, is the sign of state collapse beyond the
training length (Chen et al. 2024, "Stuffed Mamba", section 3). Rows are sent through the layers one after the other,
and each mixer through its row in pieces, whose carried states are what is measured.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.evaluation.layerwise import Layerwise
from efficient_lm.models.block import Block, BlockSpec
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters

PIECES = 16
"""Places of a row at which states are measured."""

ROWS = 4
"""Rows of validation data that are looked at."""

Figures = dict[str, np.ndarray]
"""Name → float32 values; see `diagnose`."""


class Diagnostics:
    """Measures one model; compiled programs are kept between calls, one for each kind of block.

    Args:
        dtype: of the computation.
    """

    def __init__(self, model: LanguageModel, dtype: jax.typing.DTypeLike = jnp.float32):
        self._layers = Layerwise(model, partial(_look, dtype=dtype), dtype)

    def measure(self, params: Parameters, tokens: jax.Array, context: Context | None = None) -> list[Figures]:
        """The figures of each layer.

        Args:
            params: of the model.
            tokens: int32 ``[batch, time]``; a few rows are enough.
            context: positions and documents; None takes each row as one whole document.

        Returns:
            For each layer, what its mixer has of these:
            `state_norm` ``[places]``: root mean square of the recurrent state's entries after equal parts of the row
            (a row that does not divide by `PIECES` has one place, its end);
            `state_maximum` ``[places]``: the largest root mean square, over rows, of a single entry;
            `decay` ``[3]``: least, mean and largest factor by which a state decays in a token;
            `attention_entropy` ``[heads]``: mean entropy of the weights, nats.
        """
        return jax.tree.map(np.asarray, self._layers(params, tokens, context))

    def measure_batch(self, params: Parameters, batch: Mapping[str, np.ndarray]) -> list[Figures]:
        """The figures of each layer, of a batch of the loader (see `efficient_lm.data.packing.pack`)."""
        return jax.tree.map(np.asarray, self._layers.batch(params, batch))


def _look(
    block: Block, spec: BlockSpec, x: jax.Array, context: Context, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A block's output, and the figures of its mixer if it is causal."""
    figures: dict[str, jax.Array] = {}
    if spec.mixer is not None and not spec.mixer.bidirectional:
        mixer, source = block.mixer.inner, block.mixer_input(x, context)
        if hasattr(mixer, "entropy"):
            figures["attention_entropy"] = jnp.mean(mixer.entropy(source, context), axis=0)
        if hasattr(mixer, "log_decay"):
            decay = jnp.exp(mixer.log_decay(source, context))
            figures["decay"] = jnp.stack([jnp.min(decay), jnp.mean(decay), jnp.max(decay)])
        figures |= _states(mixer, source, context, dtype)
    return block(x, context)[0], figures


def _states(mixer: Any, x: jax.Array, context: Context, dtype: jax.typing.DTypeLike) -> dict[str, jax.Array]:
    """Sizes of the recurrent state at the end of each piece; nothing for a mixer without one."""
    batch, time, _ = x.shape
    cache = mixer.init_cache(batch, time, dtype)
    recurrent = [name for name in cache if name.split(".")[-1] == "state"]
    if not recurrent:
        return {}
    pieces = PIECES if time % PIECES == 0 else 1

    def cut(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(batch, pieces, time // pieces, *array.shape[2:]), 1, 0)

    def step(cache: Any, piece: tuple[jax.Array, ...]) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        part, positions, segments = piece
        _, cache = mixer(part, replace(context, positions=positions, segment_ids=segments, mode="decode"), cache)
        power = jnp.mean(jnp.square(cache[recurrent[0]].astype(jnp.float32)), axis=0)
        return cache, (jnp.sqrt(jnp.mean(power)), jnp.sqrt(jnp.max(power)))

    _, (norms, maxima) = jax.lax.scan(step, cache, (cut(x), cut(context.positions), cut(context.segment_ids)))
    return {"state_norm": norms, "state_maximum": maxima}


def summary(layers: list[Figures]) -> dict[str, float]:
    """A few numbers for a metrics row: of each figure and layer its last value (`attention_entropy`, `decay`: mean)."""
    row: dict[str, float] = {}
    for number, figures in enumerate(layers):
        for name, values in figures.items():
            value = values[-1] if name.startswith("state") else values[1] if name == "decay" else values.mean()
            row[f"{name}/layer_{number}"] = float(value)
    return row
