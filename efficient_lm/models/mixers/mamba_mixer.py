"""MambaMixer: a selective scan over tokens, then one over the channels of each token."""

from collections.abc import Iterator
from typing import Literal

import jax
from flax import nnx

from efficient_lm.models.context import Context
from efficient_lm.models.layers.norms import NormSpec, RMSNormSpec
from efficient_lm.models.mixers.base import Cache, MixerSpec, dividing
from efficient_lm.models.mixers.mamba import MambaSpec
from efficient_lm.models.parameters import ONES, Initialization, parameter
from efficient_lm.spec import Count, OneOf

USUAL_GROUP = 32
"""Channels per step of the scan over channels, about."""


class MambaMixerSpec(MixerSpec):
    """Dual selection over tokens and channels (Behrouz et al. 2024, arXiv 2403.19888, section 3):

    ``y = S(x)``, ``z = norm(α x + β y)``, ``y + C(z) + flip(C'(flip z))``,

    where S is a Mamba over tokens, and C and C' are Mambas over the channels of one token, in both directions, instead
    of a channel mixer. The channels of a token are read in groups, each group being one step, so that nothing of
    another token enters and the whole is causal. α and β are learned and start at 1: the paper's weighted averaging of
    earlier outputs, within the block.

    Attributes:
        token: the scan over tokens.
        channel: the scans over channels.
        group: channels per step of the latter; they divide the width. None takes the divisor nearest to 32 below the
            width.
        norm: of what the scans over channels read.
    """

    kind: Literal["mamba_mixer"] = "mamba_mixer"
    token: MambaSpec = MambaSpec()
    channel: MambaSpec = MambaSpec()
    group: Count | None = None
    norm: OneOf[NormSpec] = RMSNormSpec()

    def group_size(self, width: int) -> int:
        """Channels per step in a model of this width."""
        divisors = [number for number in range(1, width) if width % number == 0]
        return self.group or min(divisors, key=lambda number: abs(number - USUAL_GROUP), default=1)

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        size = self.group_size(width)
        if width % size:
            yield "group", f"{size} channels do not divide width {width}; {dividing(width, size)}"
        yield from ((f"token.{key}", message) for key, message in self.token.faults(width))
        yield from ((f"channel.{key}", message) for key, message in self.channel.faults(size))

    def resolved(self, width: int) -> "MambaMixerSpec":
        size = self.group_size(width)
        parts = {"token": self.token.resolved(width), "channel": self.channel.resolved(size)}
        return self.model_copy(update={"group": size, **parts})

    def build(self, width: int, init: Initialization) -> nnx.Module:
        return MambaMixer(self, width, init)

    def flops_per_token(self, width: int, context_length: int) -> float:
        size = self.group_size(width)
        steps = width // size
        return self.token.flops_per_token(width, context_length) + 2 * steps * self.channel.flops_per_token(size, steps)


class MambaMixer(nnx.Module):
    def __init__(self, spec: MambaMixerSpec, width: int, init: Initialization):
        self.group = spec.group_size(width)
        self.token = spec.token.build(width, init)
        self.forward, self.backward = (spec.channel.build(self.group, init) for _ in range(2))
        self.norm = spec.norm.build(width)
        self.shares = parameter({"sources": 2}, ONES)

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """`x [batch, time, width]` → the same shape and dtype, and the cache of the scan over tokens."""
        y, cache = self.token(x, context, cache)
        shares = self.shares[...].astype(x.dtype)
        return y + self._mix_channels(self.norm(shares[0] * x + shares[1] * y)), cache

    def _mix_channels(self, z: jax.Array) -> jax.Array:
        """Each token of `z [batch, time, width]` by itself, its groups of channels being a sequence."""
        rows = z.reshape(-1, z.shape[-1] // self.group, self.group)
        context = Context.rows(*rows.shape[:2])
        y = self.forward(rows, context)[0] + self.backward(rows[:, ::-1], context)[0][:, ::-1]
        return y.reshape(z.shape)

    def log_decay(self, x: jax.Array, context: Context) -> jax.Array:
        """Of the scan over tokens, float32 ``[batch, time, inner, state]``."""
        return self.token.log_decay(x, context)

    def init_cache(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
        """That of the scan over tokens; channels keep nothing."""
        return self.token.init_cache(batch, length, dtype)
