"""Numeric precision of a run."""

from typing import TYPE_CHECKING, Literal

from efficient_lm.spec import Spec

if TYPE_CHECKING:
    import numpy as np


class PrecisionSpec(Spec):
    """What is computed and kept in which type.

    Attributes:
        compute: of activations and matrix products; norms, softmax statistics and losses are float32 in any case.
        parameters: of parameters and optimizer state.
    """

    compute: Literal["float32", "bfloat16"] = "float32"
    parameters: Literal["float32"] = "float32"

    @property
    def dtype(self) -> "np.dtype":
        """The compute type."""
        import jax.numpy as jnp

        return jnp.dtype(self.compute)
