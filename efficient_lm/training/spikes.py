"""Steps whose loss or gradient stands out from those before them, found inside the training step."""

from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from efficient_lm.spec import Count, Positive, Spec

Seen = dict[str, jax.Array]
"""`logarithms`, float32 [2, window] of losses and gradient norms, the oldest overwritten first; `count`, int32."""

NORMAL = 1.4826
"""Standard deviation of a normal distribution by its median absolute deviation."""

LEAST_DEVIATION = 0.05
"""Of a logarithm: where all values are alike, none stands out for a few percent."""

SMALLEST = 1e-30


class SpikeSpec(Spec):
    """What counts as a spike, and what is done about it.

    Attributes:
        action: ``warn`` notes it in `metrics.jsonl`; ``skip`` also leaves parameters and optimizer as they were;
            ``rollback`` returns to a checkpoint from before (see `RollbackSpec`); ``none`` does not look.
        window: steps before that a step is compared with; none stands out until there are so many.
        threshold: deviations above the median from which on a loss or a gradient norm stands out, by logarithms. The
            deviation is robust: 1.4826 times the median absolute one, and at least 0.05.
    """

    action: Literal["none", "warn", "skip", "rollback"] = "none"
    window: Annotated[Count, Field(ge=8)] = 128
    threshold: Positive = 8.0

    @property
    def looks(self) -> bool:
        """Whether the step looks for spikes; otherwise its program has nothing of this."""
        return self.action != "none"

    def resumed(self, record: dict[str, Any]) -> dict[str, Seen]:
        """`spikes` as `noted` in a checkpoint's record; of another window its newest, without a record nothing."""
        if not self.looks:
            return {}
        values = np.array(record.get("spikes", [[], []]), np.float32)[:, -self.window :]
        logarithms = np.zeros((2, self.window), np.float32)
        logarithms[:, : values.shape[1]] = values
        return {"spikes": {"logarithms": logarithms, "count": np.int32(values.shape[1])}}

    def look(self, seen: Seen, loss: jax.Array, norm: jax.Array, finite: jax.Array) -> tuple[jax.Array, Seen]:
        """How many deviations a step stands out by, float32, 0 until the window is full; and what was seen then.

        What is not a number is not seen. A spike is: a level that lasts becomes the usual one.
        """
        new = jnp.log(jnp.maximum(jnp.stack([loss, norm]), SMALLEST))
        before, count = seen["logarithms"], seen["count"]
        median = jnp.median(before, axis=1)
        deviation = NORMAL * jnp.median(jnp.abs(before - median[:, None]), axis=1)
        score = jnp.max((new - median) / jnp.maximum(deviation, LEAST_DEVIATION))
        score = jnp.where(finite & (count >= self.window), score, 0.0)
        after = before.at[:, count % self.window].set(new)
        return score, {
            "logarithms": jnp.where(finite, after, before),
            "count": count + finite.astype(jnp.int32),
        }


def noted(seen: Seen) -> list[list[float]]:
    """What was seen, oldest first, as plain numbers that give the same float32 again."""
    logarithms, count = np.asarray(seen["logarithms"]), int(seen["count"])
    window = logarithms.shape[1]
    rows = np.roll(logarithms, -(count % window), axis=1) if count >= window else logarithms[:, :count]
    return rows.astype(float).tolist()
