"""Hydra: a state space model that reads in both directions."""

from collections.abc import Iterator
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.models.context import Context
from efficient_lm.models.layers.gated_norm import GatedNorm
from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.mixers.base import Cache, MixerSpec, dividing
from efficient_lm.models.mixers.recurrent import TIME_STEP, Implementation, documents
from efficient_lm.models.parameters import ONES, ZEROS, Initialization, Uniform, parameter
from efficient_lm.spec import Count, Positive
from kernels_pallas.linear_attention import linear_attention

DIRECTIONS = 2


class HydraSpec(MixerSpec):
    """A quasiseparable matrix mixer (Hwang et al. 2024, arXiv 2407.09941, section 3): for the inner values X

    ``Y = shift(SS(X)) + flip(shift(SS'(flip X))) + diag(d) X``, then ``W_o (rms(Y silu(z)))``,

    where SS and SS' are the state space duality of Mamba-2 over earlier and over later tokens, with their own input
    dependent B, C and Δ, `shift` moves by one token so that the diagonal is counted once, and ``d = D + W_d X`` per
    head. A convolution over tokens on both sides comes first. It sees later tokens: for masked objectives only.

    Attributes:
        expand: inner values as a multiple of width.
        head_size: values per head.
        state_size: values of B and C.
        convolution: taps, an odd number.
        epsilon: of the gated norm.
        chunk_size, implementation: see `kernels_pallas.linear_attention`.
    """

    bidirectional: ClassVar[bool] = True

    kind: Literal["hydra"] = "hydra"
    expand: Positive = 2.0
    head_size: Count = 64
    state_size: Count = 64
    convolution: Count = 7
    epsilon: Positive = 1e-5
    chunk_size: Count | None = None
    implementation: Implementation = "auto"

    def inner_size(self, width: int) -> int:
        """Inner values in a model of this width."""
        return round(self.expand * width)

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        inner = self.inner_size(width)
        if inner % self.head_size:
            near = dividing(inner, self.head_size)
            yield "head_size", f"{self.head_size} does not divide the {inner} inner values; {near}"
        if self.convolution % 2 == 0:
            yield "convolution", f"{self.convolution} taps have no middle one; {self.convolution + 1} have"

    def build(self, width: int, init: Initialization) -> nnx.Module:
        return Hydra(self, width, init)

    def flops_per_token(self, width: int, context_length: int) -> float:
        """Projections, convolution, and both recurrences token by token: 5 operations per entry of each state.

        Of these, one decays, two add what the token writes, and two read.
        """
        inner = self.inner_size(width)
        heads = inner // self.head_size
        read = 2 * inner + DIRECTIONS * (2 * self.state_size + heads)
        convolved = inner + DIRECTIONS * 2 * self.state_size
        recurrences = DIRECTIONS * 5.0 * inner * self.state_size
        return 2.0 * width * read + 2 * self.convolution * convolved + recurrences + 2.0 * inner * (heads + width)


class Hydra(nnx.Module):
    def __init__(self, spec: HydraSpec, width: int, init: Initialization):
        self.spec = spec
        heads = spec.inner_size(width) // spec.head_size
        embed, inner = {"embed": width}, {"heads": heads, "head_dim": spec.head_size}
        both = {"direction": DIRECTIONS, "heads": heads}
        pair = {"direction": DIRECTIONS, "input_output": 2, "state": spec.state_size}
        self.value_gate = Linear(embed, {"value_gate": 2, **inner}, init=init, batch=1)
        self.input_output = Linear(embed, pair, init=init, batch=2)
        self.delta = Linear(embed, both, init=init, batch=1)
        bound = spec.convolution**-0.5
        self.value_taps = parameter({"taps": spec.convolution, **inner}, Uniform(-bound, bound))
        self.state_taps = parameter({"taps": spec.convolution, **pair}, Uniform(-bound, bound))
        self.delta_bias = parameter(both, TIME_STEP)
        self.decay = parameter(both, Uniform(1.0, 16.0, jnp.log))
        self.diagonal = parameter({"heads": heads}, ONES)
        self.diagonal_map = parameter({**inner, "outputs": heads}, ZEROS, sums=tuple(range(len(inner))))
        self.norm = GatedNorm(inner, over=2, order="gate_first", epsilon=spec.epsilon)
        self.output = Linear(inner, embed, init=init, residual=True)

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """`x [batch, time, width]` → the same shape and dtype; there is no cache."""
        if cache is not None:
            raise ValueError("hydra is bidirectional: it has no cache to decode from")
        ids = documents(context, None)
        pair, states = self.value_gate(x), self.input_output(x)
        value, gate = pair[..., 0, :, :], pair[..., 1, :, :]
        value = jax.nn.silu(_centred(value, self.value_taps[...], ids))
        states = jax.nn.silu(_centred(states, self.state_taps[...], ids))
        delta = jax.nn.softplus(self.delta(x).astype(jnp.float32) + self.delta_bias[...])
        decay = -jnp.exp(self.decay[...]) * delta
        wide = value.astype(jnp.float32)
        y = wide * self._diagonal(wide)[..., None]
        for direction in range(DIRECTIONS):
            y = y + self._scan(direction, wide, states[:, :, direction], delta, decay, ids)
        return self.output(self.norm(y, gate)), None

    def _diagonal(self, value: jax.Array) -> jax.Array:
        """``D + W_d X``, float32 ``[batch, time, heads]``."""
        return self.diagonal[...] + jnp.einsum("bthd,hdk->btk", value, self.diagonal_map[...])

    def _scan(
        self,
        direction: int,
        value: jax.Array,
        states: jax.Array,
        delta: jax.Array,
        decay: jax.Array,
        ids: jax.Array | None,
    ) -> jax.Array:
        """What all earlier (0) or all later (1) tokens of the document add, float32 ``[batch, time, heads, size]``."""

        def turned(array: jax.Array) -> jax.Array:
            return array[:, ::-1] if direction else array

        step, log_decay = turned(delta[:, :, direction]), turned(decay[:, :, direction])
        states, value = turned(states).astype(jnp.float32), turned(value)
        order = None if ids is None else turned(ids)
        y, _ = linear_attention(
            states[:, :, 1, None], states[:, :, 0, None], value * step[..., None], log_decay,
            segment_ids=order, chunk_size=self.spec.chunk_size, implementation=self.spec.implementation,
        )  # fmt: skip
        return turned(_shifted(y, 1, order))

    def init_cache(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
        raise ValueError("hydra is bidirectional: it has no cache to decode from")


def _shifted(x: jax.Array, by: int, ids: jax.Array | None) -> jax.Array:
    """`x [batch, time, ...]` of the token `by` places earlier (later, if negative); zero across documents' borders."""
    if by == 0:
        return x

    def move(array: jax.Array) -> jax.Array:
        pad = [(0, 0), (max(by, 0), max(-by, 0))] + [(0, 0)] * (array.ndim - 2)
        moved = jnp.pad(array, pad)
        return moved[:, : array.shape[1]] if by > 0 else moved[:, -array.shape[1] :]

    if ids is None:
        return move(x)
    same = (move(ids) == ids) & (ids != 0)
    return jnp.where(same.reshape(*same.shape, *[1] * (x.ndim - 2)), move(x), 0)


def _centred(x: jax.Array, taps: jax.Array, ids: jax.Array | None) -> jax.Array:
    """Depthwise convolution of `x [batch, time, ...]` with `taps [width, ...]` whose middle meets the token itself."""
    middle = len(taps) // 2
    return sum(tap.astype(x.dtype) * _shifted(x, middle - index, ids) for index, tap in enumerate(taps))
