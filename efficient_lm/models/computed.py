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
        flops: of the halves that ran, of what decided so (routers, exits that were looked at), and of what every token
            runs: the head, and what is in front of the layers and beside their halves.
        full_flops: of every half and what every token runs.
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

    def mixing(lengths: np.ndarray) -> np.ndarray:
        return np.array([of.mixing_flops(width, length) for of, length in zip(model.layers, lengths, strict=True)])

    whole = np.full(len(mixers), float(context_length))
    # Tokens that a depth rule chooses see only each other.
    depths = [layer.depth for layer in model.layers]
    chosen = [depth is not None and depth.chooses for depth in depths]
    seen = np.where(chosen, np.maximum(whole * mixers / max(tokens, 1), 1.0), whole)
    of_ffns = np.array([layer.ffn.flops_per_token(width) if layer.ffn else 0.0 for layer in model.layers])
    beside = sum(layer.flops_beside(width) for layer in model.layers)
    always = beside + model.flops_around_layers(context_length)
    rules = sum(depth.flops_per_token(width, lambda _: 0.0, context_length) for depth in depths if depth is not None)
    flops = mixers @ mixing(seen) + ffns @ of_ffns + tokens * (rules + always)
    if skipping is not None:
        flops += np.maximum(mixers, ffns) @ skipping.deciding(model)
    full = tokens * (mixing(whole).sum() + of_ffns.sum() + always)
    has = np.array([[s.mixer is not None, s.ffn is not None] for s in model.layers]).T
    return Computed(tokens, mixers * has[0], ffns * has[1], float(flops), float(full))
