"""No rule: every token runs every block."""

from typing import Literal

from efficient_lm.models.depth.base import DepthSpec


class NoDepthSpec(DepthSpec):
    """Every token runs the block, which is the same as no rule."""

    kind: Literal["none"] = "none"
