"""How attention knows where a token is: rotary embedding, ALiBi, T5 relative bias, or nothing at all.

A position module may turn queries and keys (`rotate`) and may add to the logits (`bias`). Learned absolute positions
are added to the token embedding instead: see `ModelSpec.learned_positions`.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import model_validator
from pydantic_core import PydanticCustomError

from efficient_lm.models.parameters import Normal, parameter
from efficient_lm.spec import Choice, Count, Fraction, OneOf, Positive


class RopeScalingSpec(Choice, role="rotary scaling"):
    """How rotary frequencies are changed to reach beyond the trained context."""

    def scale(self, frequencies: np.ndarray, theta: float, size: int) -> tuple[np.ndarray, float]:
        """New frequencies (radians per token, ``[size / 2]``, float32) and a factor for the cosines and sines."""
        raise TypeError(f"{type(self).__name__} does not define scale")


class LinearScalingSpec(RopeScalingSpec):
    """Position interpolation (Chen et al. 2023): every frequency divided by `factor`."""

    kind: Literal["linear"] = "linear"
    factor: Positive

    def scale(self, frequencies: np.ndarray, theta: float, size: int) -> tuple[np.ndarray, float]:
        return frequencies / self.factor, 1.0


class Llama3ScalingSpec(RopeScalingSpec):
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth blend between."""

    kind: Literal["llama3"] = "llama3"
    factor: Positive
    low_frequency_factor: Positive = 1.0
    high_frequency_factor: Positive = 4.0
    original_context: Count = 8192

    @model_validator(mode="after")
    def _in_order(self) -> "Llama3ScalingSpec":
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise PydanticCustomError("scaling", "high_frequency_factor must be above low_frequency_factor", {})
        return self

    def scale(self, frequencies: np.ndarray, theta: float, size: int) -> tuple[np.ndarray, float]:
        turns = self.original_context * frequencies / (2 * math.pi)
        span = self.high_frequency_factor - self.low_frequency_factor
        kept = np.clip((turns - self.low_frequency_factor) / span, 0.0, 1.0)
        return frequencies * (kept + (1 - kept) / self.factor), 1.0


class YarnScalingSpec(RopeScalingSpec):
    """YaRN (Peng et al. 2023, sections 3.2 to 3.4): interpolation by wavelength, and a temperature on the logits."""

    kind: Literal["yarn"] = "yarn"
    factor: Positive
    original_context: Count
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Positive | None = None
    truncate: bool = True

    def scale(self, frequencies: np.ndarray, theta: float, size: int) -> tuple[np.ndarray, float]:
        low, high = self._dimension(self.beta_fast, theta, size), self._dimension(self.beta_slow, theta, size)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        ramp = np.clip((np.arange(size // 2, dtype=np.float32) - low) / ((high - low) or 1e-3), 0.0, 1.0)
        temperature = self.attention_factor
        if temperature is None:
            temperature = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return frequencies * (1 - ramp) + frequencies / self.factor * ramp, temperature

    def _dimension(self, turns: float, theta: float, size: int) -> float:
        """The (fractional) frequency index that makes `turns` full turns over the original context."""
        return size * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))


class PositionSpec(Choice, role="position"):
    """A position encoding of attention."""

    def build(self, heads: int, head_size: int) -> "Position":
        """The module for `heads` query heads of `head_size`."""
        return Position()


class NoPositionSpec(PositionSpec):
    """No encoding: order is known from causality alone (Kazemnejad et al. 2023, NoPE)."""

    kind: Literal["none"] = "none"


class RotarySpec(PositionSpec):
    """Rotary embedding (Su et al. 2021, eq. 34), in the half-split layout of GPT-NeoX and Llama, or in the paper's.

    Attributes:
        theta: base wavelength.
        fraction: share of each head's values that turn, their number rounded down and then to a whole number of pairs
            by one more; the rest carries no position.
        scaling: change of frequencies for a longer context.
        interleaved: whether the values of a pair are neighbours, as in the paper and in DeepSeek, and not half a head
            apart. They come out half-split all the same: the product of a query and a key does not depend on it.
    """

    kind: Literal["rotary"] = "rotary"
    theta: Positive = 10000.0
    fraction: Fraction = 1.0
    scaling: OneOf[RopeScalingSpec] | None = None
    interleaved: bool = False

    def build(self, heads: int, head_size: int) -> "Position":
        return Rotary(self, head_size)


class AlibiSpec(PositionSpec):
    """Attention with linear biases (Press et al. 2021): head h is biased by ``-slope_h * distance``."""

    kind: Literal["alibi"] = "alibi"

    def build(self, heads: int, head_size: int) -> "Position":
        return Alibi(heads)


class RelativeBiasSpec(PositionSpec):
    """T5 relative bias (Raffel et al. 2020, section 2.1), causal: a learned bias per head and bucket of distance.

    Half of the buckets are one distance each, the others grow logarithmically up to `max_distance`.
    """

    kind: Literal["relative_bias"] = "relative_bias"
    buckets: Count = 32
    max_distance: Count = 128

    def build(self, heads: int, head_size: int) -> "Position":
        return RelativeBias(self, heads)


class Position(nnx.Module):
    """The encoding that does nothing, and the interface of those that do something."""

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Turn queries or keys `x [batch, time, heads, head_size]` at `positions [batch, time]`."""
        return x

    def bias(self, queries: jax.Array, keys: jax.Array) -> jax.Array | None:
        """Added to the logits: ``[batch, heads, time, keys]``, of positions `[batch, time]` and `[batch, keys]`."""
        return None


class Rotary(Position):
    def __init__(self, spec: RotarySpec, head_size: int):
        size = int(head_size * spec.fraction)
        # Published models were trained with exponents and powers rounded to float32, and far positions feel it.
        exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(max(size, 1))
        frequencies = 1 / np.power(spec.theta, exponents, dtype=np.float64).astype(np.float32)
        temperature = 1.0
        if spec.scaling is not None and size:
            frequencies, temperature = spec.scaling.scale(frequencies, spec.theta, size)
        self.temperature, self.interleaved = temperature, spec.interleaved
        self.frequencies = tuple(float(value) for value in frequencies)

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(self.frequencies, jnp.float32)
        cosine, sine = jnp.cos(angles) * self.temperature, jnp.sin(angles) * self.temperature
        half = len(self.frequencies)
        turning = x[..., : 2 * half].astype(jnp.float32)
        pair = (turning[..., ::2], turning[..., 1::2]) if self.interleaved else jnp.split(turning, 2, axis=-1)
        first, second = pair
        turned = [first * cosine - second * sine, second * cosine + first * sine]
        return jnp.concatenate([part.astype(x.dtype) for part in turned] + [x[..., 2 * half :]], axis=-1)


class Alibi(Position):
    def __init__(self, heads: int):
        self.slopes = tuple(_alibi_slopes(heads))

    def bias(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        distance = jnp.abs(queries[:, None, :, None] - keys[:, None, None, :]).astype(jnp.float32)
        return -jnp.asarray(self.slopes, jnp.float32)[None, :, None, None] * distance


def _alibi_slopes(heads: int) -> list[float]:
    """Geometric from ``2 ** (-8 / n)``; between powers of two, every other slope of the next power fills up."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (index + 1) / power) for index in range(power)]
    extra = [2 ** (-4 * (index + 1) / power) for index in range(0, 2 * (heads - power), 2)]
    return slopes + extra


class RelativeBias(Position):
    def __init__(self, spec: RelativeBiasSpec, heads: int):
        self.buckets, self.max_distance = spec.buckets, spec.max_distance
        self.table = parameter({"buckets": spec.buckets, "heads": heads}, Normal(0.02))

    def bias(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        distance = jnp.maximum(queries[:, :, None] - keys[:, None, :], 0)
        exact = self.buckets // 2
        ratio = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(self.max_distance / exact)
        far = exact + (ratio * (self.buckets - exact)).astype(jnp.int32)
        bucket = jnp.where(distance < exact, distance, jnp.minimum(far, self.buckets - 1))
        return jnp.moveaxis(self.table[...][bucket], -1, 1)
