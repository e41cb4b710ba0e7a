"""What a pass really computed: the halves of the layers that tokens ran, counted, and their FLOPs from the spec."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from efficient_lm.models.skipping.base import SkippingSpec

if TYPE_CHECKING:
    from efficient_lm.models.language_model import LanguageModel


@dataclass(frozen=True)
class Computed:
    """What some tokens ran.

    Attributes:
        tokens: how many.
        mixers, ffns: of each layer how many ran that half: float64 ``[layers]``.
        flops: of the halves that ran, of the exits that were looked at to decide, and of the head.
        full_flops: of every half and the head.
    """

    tokens: int
    mixers: np.ndarray
    ffns: np.ndarray
    flops: float
    full_flops: float

    def figures(self) -> dict[str, Any]:
        """Plain numbers: `tokens`; `mixers_per_token`, `ffns_per_token` and how many there are, `mixers`, `ffns`, by
        layer the share of tokens that ran each, `flops_per_token` and `flops_share` of the whole model's."""
        count = max(self.tokens, 1)
        return {
            "tokens": self.tokens,
            "mixers_per_token": float(self.mixers.sum() / count),
            "ffns_per_token": float(self.ffns.sum() / count),
            "mixer_shares": (self.mixers / count).tolist(),
            "ffn_shares": (self.ffns / count).tolist(),
            "flops_per_token": self.flops / count,
            "flops_share": self.flops / max(self.full_flops, 1e-30),
        }

    def __str__(self) -> str:
        found, depth = self.figures(), len(self.mixers)
        return (
            f"{self.tokens:,} tokens ran {found['mixers_per_token']:.2f} mixers and {found['ffns_per_token']:.2f} ffns "
            f"of {depth} layers on average: {100 * found['flops_share']:.1f} % of the FLOPs of the whole model"
        )


def computed(
    model: "LanguageModel",
    skipping: SkippingSpec | None,
    ran: np.ndarray,
    tokens: int,
    context_length: float,
) -> Computed:
    """What tokens computed.

    Keys, values and states that mixers keep of tokens which do not run them are not counted.

    Args:
        ran: tokens that ran the mixer, and the ffn, of each layer: ``[2, layers]``.
        context_length: of sequences whose tokens cost as much on average.
    """
    width, (mixers, ffns) = model.spec.width, np.asarray(ran, np.float64)
    of_mixers = np.array([s.mixer.flops_per_token(width, context_length) if s.mixer else 0.0 for s in model.layers])
    of_ffns = np.array([s.ffn.flops_per_token(width) if s.ffn else 0.0 for s in model.layers])
    head = 2.0 * width * model.spec.vocab_size
    reads = np.zeros(len(mixers), bool) if skipping is None else skipping.reads(model)
    flops = mixers @ of_mixers + ffns @ of_ffns + head * (tokens + np.maximum(mixers, ffns) @ reads)
    full = tokens * (of_mixers.sum() + of_ffns.sum() + head)
    has = np.array([[s.mixer is not None, s.ffn is not None] for s in model.layers]).T
    return Computed(tokens, mixers * has[0], ffns * has[1], float(flops), float(full))
