"""Based: linear attention over everything, and exact attention over a short window, in one mixer."""

from collections.abc import Iterator
from typing import Literal

from flax import nnx

from efficient_lm.models.layers.feature_maps import TaylorSpec
from efficient_lm.models.mixers.attention import HEAD_SIZE, AttentionSpec
from efficient_lm.models.mixers.base import MixerSpec
from efficient_lm.models.mixers.linear_attention import LinearAttentionSpec
from efficient_lm.models.mixers.parallel import BranchSpec, ParallelSpec
from efficient_lm.models.mixers.recurrent import Implementation
from efficient_lm.models.parameters import Initialization
from efficient_lm.spec import Count, PerLayer


class BasedSpec(MixerSpec):
    """The sum of linear attention, ``exp`` to second order over all tokens, and softmax attention over the last few.

    (Arora et al. 2024, arXiv 2402.18668.) The two complete each other: one recalls far tokens roughly, the
    other compares near ones exactly. The paper has them in layers of their own, which a layout of the kinds
    ``linear_attention`` and ``attention`` writes as well; here each has its own maps and every layer has both.

    Attributes:
        heads: of either part; None has as many as `head_size` (64, unless given) goes into the width.
        head_size: values per head; None takes ``width / heads``.
        feature_size: values per head of the queries and keys whose exponential is approximated; the state has
            ``1 + feature_size + feature_size (feature_size + 1) / 2`` rows.
        window: tokens that the exact part sees, the current one included.
        chunk_size: of the linear part, see `kernels_pallas.linear_attention`.
        implementation: of both.
    """

    kind: Literal["based"] = "based"
    heads: PerLayer[Count | None] = None
    head_size: Count | None = None
    feature_size: Count = 16
    window: PerLayer[Count] = 64
    chunk_size: Count | None = None
    implementation: Implementation = "auto"

    def parts(self, width: int) -> ParallelSpec:
        """Both parts as mixers side by side."""
        heads = self.heads or max(1, width // (self.head_size or HEAD_SIZE))
        linear = LinearAttentionSpec(
            heads=heads, key_size=self.feature_size, value_size=self.head_size, feature_map=TaylorSpec(),
            chunk_size=self.chunk_size, implementation=self.implementation,
        )  # fmt: skip
        window = AttentionSpec(
            heads=heads, head_size=self.head_size, window=self.window, implementation=self.implementation
        )
        return ParallelSpec(first=BranchSpec(mixer=linear), second=BranchSpec(mixer=window))

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        yield from ((key.split(".")[-1], message) for key, message in self.parts(width).faults(width))

    def resolved(self, width: int) -> "BasedSpec":
        heads = self.heads or max(1, width // (self.head_size or HEAD_SIZE))
        return self.model_copy(update={"heads": heads, "head_size": self.head_size or width // heads})

    def counted(self) -> dict[str, tuple[str, ...]]:
        return {"heads": ("heads",)}

    def build(self, width: int, init: Initialization) -> nnx.Module:
        return self.parts(width).build(width, init)

    def flops_per_token(self, width: int, context_length: int) -> float:
        return self.parts(width).flops_per_token(width, context_length)
